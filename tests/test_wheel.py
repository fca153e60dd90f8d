"""The wheel, as a user gets it: built from the source distribution, installed elsewhere, run in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from nmt import __version__

ROOT = Path(__file__).parents[1]
DEMO = ["training.max_steps=2", "corpus.max_pairs=300", "corpus.subwords.vocab_size=512"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, text: str = "") -> str:
    """Standard output of a command that must succeed, run without any Python path of ours."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build` makes the source distribution, and the wheel from that. The backend comes from the index."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of a new environment with the wheel; its dependencies are those of this one.

    They are reached by a .pth file that names our site-packages. Python does not read the .pth files in there, so the
    editable installation of the clone does not exist in the new environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python.parent


def test_bundled_files(wheel: Path) -> None:
    """conf/ and the phrasebook travel inside the package, every file of them; tests and scripts do not."""
    names = zipfile.ZipFile(wheel).namelist()
    for folder, pattern in (("conf", "*.yaml"), ("data/phrasebook", "*.toml")):
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)]
        assert files
        assert {f"nmt/_bundled/{name}" for name in files} <= set(names)
    assert "nmt/py.typed" in names
    (metadata,) = {name.split("/")[0] for name in names} - {"nmt"}
    assert metadata.endswith(".dist-info")


def test_command_line(installed: Path, tmp_path: Path) -> None:
    """Help, two updates of the demo, and a translation of three lines."""
    location = run(installed / "python", "-c", "import nmt.cli; print(nmt.cli.__file__)", cwd=tmp_path).strip()
    assert Path(location).is_relative_to(installed.parent)
    nmt = installed / "nmt"
    assert "nmt prepare corpus=NAME" in run(nmt, "--help", cwd=tmp_path)
    assert run(nmt, "--version", cwd=tmp_path) == f"nmt {__version__}\n"
    (tmp_path / "conf" / "corpus").mkdir(parents=True)
    (tmp_path / "conf" / "corpus" / "mine.yaml").write_text("name: own\nsource: phrasebook\n")
    assert "name: own\n" in run(nmt, "prepare", "corpus=mine", "--cfg", "job", cwd=tmp_path)
    run(nmt, "train", "experiment=demo", *DEMO, cwd=tmp_path)
    assert (tmp_path / "runs" / "demo").is_dir()
    translated = run(nmt, "translate", "demo", cwd=tmp_path, text="The train leaves at 14:35.\n\nWhere is it?\n")
    lines = translated.split("\n")
    assert len(lines) == 4
    assert lines[1] == lines[3] == ""


def test_the_description_has_nothing_that_works_in_the_repository_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode().partition("\n\n")[2]
    assert text.startswith("# nmt-moe")
    assert "| experts per layer |" in text
    assert "![" not in text
    assert "](docs/" not in text
    assert "<!--" not in text


def test_the_licence_is_said_and_goes_along(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode()
    for line in ("License-Expression: Apache-2.0", "Author: the nmt-moe authors", "Provides-Extra: train"):
        assert f"{line}\n" in text


def test_the_source_distribution_is_whole(wheel: Path) -> None:
    """What a reader of the source looks for, and what the tests and the build need."""
    (found,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"nmt/py.typed", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "tests/toy.py"} <= names
