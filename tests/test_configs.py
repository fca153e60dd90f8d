"""The YAML files of conf/ and the schema: all compose, build, are documented and tell the truth about themselves."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nmt.compose import INHERITED, compose_config
from nmt.cost.operations import model_cost
from nmt.resources import resource_dir
from nmt.run import RunDirectory
from tests.own_conf import COMPLETE, OWN

CONF = resource_dir("conf")
GROUPS = ("corpus", "model", "training", "decoding")
COUNTS = re.compile(r"# ([\d.,]+)M parameters, ([\d.,]+)M ops/timestep\.")


def documented_counts(path: Path) -> tuple[float, float]:
    """(millions of parameters, millions of operations) from the last comment line at the head of an experiment."""
    head: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    found = COUNTS.fullmatch(head[-1])
    assert found, f"{path.name}: the last line of its head, {head[-1]!r}, does not tell the model's size"
    parameters, operations = (float(number.replace(",", "")) for number in found.groups())
    return parameters, operations


@pytest.mark.parametrize("name", COMPLETE)
def test_experiment(name: str) -> None:
    """Composes (which validates), is called after its file, and its model has the documented size."""
    config = compose_config([f"experiment={name}"])
    assert config.run.name == name
    # That the network has so many parameters, test_operations.py sees.
    cost = model_cost(config.model, config.corpus.subwords.num_pieces)
    parameters, operations = documented_counts(CONF / "experiment" / f"{name}.yaml")
    assert round(cost.num_parameters / 1e6, 1) == parameters
    assert round(cost.ops_per_timestep / 1e6, 1) == operations


def test_no_file_of_the_project_is_missed() -> None:
    """In a clone git knows which they are; files that users add are not under test."""
    listed = subprocess.run(["git", "ls-files", "*.yaml"], cwd=CONF, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no clone")
    own = [f"{group}/{name}.yaml" for group, found in OWN.items() for name in found]
    assert sorted(listed.stdout.split()) == sorted([*own, "config.yaml"])


def test_fine_tuning_takes_the_network_of_another_run(run: Path) -> None:
    config = compose_config(["experiment=fine_tune", f"run.start_from={run}"])
    assert config.run.name == "fine_tune"
    assert config.model == replace(RunDirectory(run).config().model, dropout=0.3)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in OWN[group] if name != INHERITED]
)
def test_group_file(group: str, name: str) -> None:
    """Composes and validates on top of the defaults."""
    config = compose_config([f"{group}={name}"])
    if group == "corpus":
        # Files are copied, and the phrasebook knows several languages: both have names that say more.
        assert config.corpus.name.startswith({"files": "my_corpus"}.get(name, name))


def test_groups_are_all_there() -> None:
    assert {*GROUPS, "experiment"} == set(OWN) <= {path.name for path in CONF.iterdir()}


def test_defaults() -> None:
    """Without any choice the program is the phrasebook, the paper's network, and a run that has no name yet."""
    config = compose_config([])
    assert (config.corpus.source, config.model.moe.num_experts, config.run.name) == ("phrasebook", 32, "")
