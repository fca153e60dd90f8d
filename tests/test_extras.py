"""Translating, scoring and explaining need none of the extras; what does need one says which."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nmt.cli import main
from nmt.errors import MissingExtraError
from nmt.extras import EXTRAS, named_extras

ROOT = Path(__file__).parents[1]
MODULES = [module for modules in EXTRAS.values() for module in modules]

# A module that is None in sys.modules cannot be imported. pandas comes with datasets. PyTorch itself imports a part of
# torch.distributed; nothing may be added to that.
BLOCKED = """
import contextlib, io, json, sys
for name in {blocked}:
    sys.modules[name] = None
from nmt.cli import main
import torch
before = {{name for name in sys.modules if name.startswith("torch.distributed")}}
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    results.append((status, out.getvalue(), err.getvalue()))
added = sorted(name for name in sys.modules if name.startswith("torch.distributed") and name not in before)
print(json.dumps((results, added)))
"""


def blocked(*commands: list[str], cwd: Path) -> tuple[list[tuple[int, str, str]], list[str]]:
    """(status, output and errors of each command in a process without extras; what it loaded of torch.distributed)."""
    code = BLOCKED.format(blocked=[*MODULES, "pandas"])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results, added = json.loads(done.stdout)
    return [(status, out, err) for status, out, err in results], added


@pytest.mark.slow
def test_an_exported_model_translates_scores_and_explains_without_extras(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    text = [str(run / "text" / f"test.{side}") for side in ("source", "target")]
    sentence = Path(text[0]).read_text().split("\n")[0]
    assert main(["translate", str(run), text[0], "-o", str(tmp_path / "expected")]) == 0
    results, distributed = blocked(
        ["translate", "exported", text[0], "-o", "out"],
        ["evaluate", "exported", "--source", text[0], "--reference", text[1]],
        ["experts", "exported", "--source", text[0], "--reference", text[1]],
        ["experts", "exported", "--explain", sentence],
        ["cost", "exported", "--json"],
        ["settings", "decoding"],
        ["--version"],
        cwd=tmp_path,
    )
    assert [status for status, _, _ in results] == [0] * len(results), results
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()
    assert "perplexity" in results[1][1]
    assert distributed == []


@pytest.mark.slow
def test_a_command_that_needs_an_extra_names_it(tmp_path: Path) -> None:
    results, _ = blocked(
        ["train", "experiment=demo"],
        ["prepare", "corpus=phrasebook"],
        ["cost", "experiment=demo"],
        cwd=tmp_path,
    )
    for status, out, err in results:
        assert (status, out) == (2, "")
        assert re.fullmatch(r"nmt: nmt \w+ needs \w+, which is not installed: pip install 'nmt-moe\[train\]'\n", err)
    assert list(tmp_path.iterdir()) == []


def test_only_modules_of_extras_are_named() -> None:
    with pytest.raises(MissingExtraError, match=r"^work needs babel, .*'nmt-moe\[phrasebook\]'$"), named_extras("work"):
        raise ModuleNotFoundError("no", name="babel.numbers")
    with pytest.raises(ModuleNotFoundError), named_extras("work"):
        raise ModuleNotFoundError("no", name="nmt.nothing")


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {
        extra: {re.match(r"[\w-]+", each)[0] for each in needed}
        for extra, needed in [*project["optional-dependencies"].items(), ("", project["dependencies"])]
    }
    assert {*EXTRAS, "dev"} == requirements.keys() - {""}
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        for module in modules:
            for distribution in distributions.get(module, ()):
                assert distribution in requirements[extra]
                assert distribution not in requirements[""]
