"""README.md and docs/: their commands exist, their links lead somewhere, and what is made from code is not stale."""

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import nmt as package
from nmt.cli import main as nmt
from nmt.commands import is_setting
from nmt.compose import asked, jobs
from nmt.config import Config
from nmt.config.reading import read_value
from tests.scripts import load_script
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ON_A_RUN = ("translate", "score", "evaluate", "compare", "experts", "export")


# ------------------------------------------------------------------------------------------------------ commands


def commands_in(markdown: str) -> Iterator[list[str]]:
    """The words of each command of nmt, make or python in a block of code, without comments and redirections.

    In a block with output, commands begin with "$ ".
    """
    for block in re.findall(r"^```\w*\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        prompts = any(line.startswith("$ ") for line in lines)
        for line in lines:
            if prompts and not line.startswith("$ "):
                continue
            line = re.sub(r"^source <\((.*)\)", r"\1", line.removeprefix("$ "))
            for part in re.split(r"\s\|\s", re.sub(r"\s[<>]\s*\S+", "", line)):
                if part.split(" ")[0] in ("nmt", "make", "python", "sbatch", "torchrun"):
                    yield shlex.split(part, comments=True)


def check_nmt(command: str, words: list[str]) -> None:
    """ValueError, or an argparse exit, for a command that nmt would refuse before it looks at any run."""
    if command in ("prepare", "train"):
        if "--processes" in words:
            place = words.index("--processes")
            del words[place : place + 2]
        request = asked(words)
        jobs(request._replace(words=[word for word in request.words if "=" in word]))
        return
    parser = import_module(f"nmt.commands.{command}").parser()
    given, words = parser.sort(words)
    settings = [word for word in words if is_setting(word) or word.startswith(("experiment=", "model="))]
    if command in ON_A_RUN:
        for key, _, value in (setting.partition("=") for setting in settings):
            assert key.startswith(("decoding.", "evaluation."))
            read_value(Config, key, value)
    else:
        jobs(asked(settings))
    plain = [word for word in words if word not in settings]
    parser.parse_args([*given, "--", *(plain or ["RUN"])])


def check(words: list[str]) -> None:
    """A failed assertion or a ValueError for a command that does not exist."""
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    match words:
        case ["nmt", "--version" | "--help"]:
            pass
        case ["nmt", command, *rest]:
            check_nmt(command, rest)
        case ["make", target, *variables]:
            assert target in targets
            assert all(re.fullmatch("[A-Z]+=.*", each) for each in variables)
        case ["sbatch", script, *rest]:
            assert (ROOT / script).is_file()
            check_nmt("train", rest)
        case ["torchrun", *_, "-m", "nmt.cli", "train", setting]:
            check_nmt("train", [setting])
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            raise AssertionError(words)


@pytest.fixture
def own_text(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the files of conf/corpus/ that pages show, and the runs that others start from."""
    for name in ("both", "europarl", "general"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(run / "config.yaml", tmp_path / "runs" / name)
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    path = tmp_path / "conf" / "corpus" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(settings)
    training = (ROOT / "docs" / "training.md").read_text()
    (settings,) = re.findall(r"^```yaml\n(name: mine_bt\n.*?)^```$", training, flags=re.DOTALL | re.MULTILINE)
    path.with_name("mine_bt.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("own_text")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page: Path):
    for words in commands_in(page.read_text()):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{shlex.join(words)}: {type(error).__name__}: {error}")


def test_commands_are_found():
    """Every page about commands shows some; a change of form must not hide them."""
    shown = {page.name: len(list(commands_in(page.read_text()))) for page in PAGES}
    assert all(shown[name] >= 5 for name in ("README.md", "training.md", "experts.md", "decoding.md")), shown
    page = "```\n$ nmt a b=1 --c > d   # e\nnmt output\n```\n\n```\necho 'x' | nmt f \\\n    g\n# nmt h\n```\n"
    assert list(commands_in(page)) == [["nmt", "a", "b=1", "--c"], ["nmt", "f", "g"]]


@pytest.mark.parametrize(
    "line",
    [
        "nmt translat demo",
        "nmt translate demo --beam 4",
        "nmt translate demo decoding.beam=4",
        "nmt evaluate demo training.max_steps=4",
        "nmt train experiment=dem",
        "nmt train experiment=demo training.max_step=4",
        "nmt cost experiment=demo --gpu 4",
        "make demos",
        "python scripts/none.py",
        "sbatch scripts/slurm.sh experiment=none",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str):
    with pytest.raises((AssertionError, ImportError, ValueError, SystemExit)):
        check(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_commands_within_text_exist(page: Path):
    """`training.seed=2`, `nmt cost RUN` and `make bench`, wherever text names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    help_text = import_module("nmt.cli")._USAGE
    targets = (ROOT / "Makefile").read_text()
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if code.endswith((".model", ".safetensors", ".json")):
            continue  # files
        if found := re.fullmatch(r"(training|decoding|model|parallel|evaluation|corpus|run)\.([\w.]+)(=[^,|]*)?", code):
            key, value = f"{found[1]}.{found[2]}", (found[3] or "").removeprefix("=")
            if value and value.upper() != value:
                read_value(Config, key, value)
            else:
                import_module("nmt.config.reading").setting_type(Config, key)
        if code.startswith("nmt ") and not code.startswith("nmt -"):
            assert re.search(rf"^  nmt {code.split()[1]}\b", help_text, flags=re.MULTILINE), code
        if code.startswith("make "):
            assert re.search(rf"^{code.split()[1]}:", targets, flags=re.MULTILINE), code


def test_python_of_a_page_uses_names_that_exist():
    """Its examples run in tests/test_tour.py, which is slow."""
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            compile(block, page.name, "exec")
    named = set(re.findall(r"\bnmt\.([A-Za-z]\w*)", (ROOT / "docs" / "python.md").read_text()))
    errors = set(re.findall(r"^\| `(\w+Error)` ", (ROOT / "docs" / "python.md").read_text(), flags=re.MULTILINE))
    assert named <= set(package.__all__)
    assert errors == {name for name in package.__all__ if name.endswith("Error")}


# --------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_tables_and_code_of_a_page_are_blocks(page: Path):
    """A table needs a blank line before it and after it, and equally many cells in every row; code must end."""
    lines = page.read_text().splitlines()
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    fenced = False
    for before, line in zip(["", *lines], [*lines, ""], strict=True):
        fenced ^= before.startswith("```")
        if fenced:
            continue
        if line.startswith("|") != before.startswith("|"):
            assert "" in (line, before), f"no blank line between {before!r} and {line!r}"
        elif line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", before)), line


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())}
    assert set(PAGES[1:]) <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# -------------------------------------------------------------------------------------------- made from the code


def test_the_page_of_settings_is_what_the_code_gives():
    script = load_script("scripts/make_docs.py")
    assert script.CONFIGURATION.read_text() == script.page(), "run python scripts/make_docs.py"


def test_the_page_of_settings_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    assert nmt(["settings", "decoding"]) == 0
    printed = re.findall(r"^(\S+) \(", capsys.readouterr().out, flags=re.MULTILINE)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert len(printed) > 5
    assert all(f"`{key}`" in page for key in printed)


def test_the_map_of_the_code_has_every_room():
    """Floors are those that are tested; lines may be some behind."""
    script = load_script("scripts/make_docs.py")
    text, now = script.ARCHITECTURE.read_text(), script.lines_of_rooms()
    rows = re.findall(r"^\| `(\w+)/` \| (\d+) \| ([\d,]+) \|", text, flags=re.MULTILINE)
    assert {room for room, _, _ in rows} == now.keys() - {""}
    for room, floor, lines in rows:
        assert FLOORS[room] == int(floor), room
        assert abs(now[room] - int(lines.replace(",", ""))) <= 0.5 * now[room], "run python scripts/make_docs.py"
    up_to_date = script.with_lines(text)
    assert script.with_lines(re.sub(r"(\| \d+ \|) [\d,]+ \|", r"\1 0 |", up_to_date)) == up_to_date
