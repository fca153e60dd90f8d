"""Who may import whom, and how long things may get: read off the source, so no rule needs remembering."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nmt"

FLOORS = {
    "config": 0,
    "batch": 0,
    "tokens": 0,
    "resources": 0,
    "errors": 0,
    "extras": 0,
    "files": 0,
    "textfile": 0,
    "process": 0,
    "lock": 0,
    "terminal": 0,
    "wording": 0,
    "text": 0,
    "corpus": 1,
    "model": 1,
    "cost": 1,
    "metrics": 2,
    "data": 2,
    "preparation": 3,
    "device": 3,
    "run": 3,
    "checkpoint": 3,
    "parameters": 3,
    "parallel": 3,
    "decoding": 4,
    "streams": 5,
    "evaluation": 5,
    "students": 6,
    "training": 6,
    "experts": 7,
    "pages": 8,
    "commands": 9,
    "compose": 10,
    "api": 11,
    "cli": 11,
    "__main__": 12,
}
"""Folders and files of nmt. Each may import lower floors and what is in its own folder; files of floors 0 and
3 may import others of their floor."""
NEIGHBOURLY = (0, 3)

ONE_FILE_EACH = ("sentencepiece", "sentencex", "datasets", "sacrebleu", "tensorboard", "py3langid")
"""Libraries that one file knows, whichever it is."""
ONLY_IN = {
    "hydra": "compose.py",
    "omegaconf": "compose.py",
    "babel": "corpus/lexicon.py",
    "num2words": "corpus/lexicon.py",
}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

Sources = dict[str, str]
"""Text of each file by its path below nmt."""


def read_sources() -> Sources:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(source: str) -> list[str]:
    """Full dotted names of all imports, also those inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module, names, level):
                prefix = "." * level + (module or "")
                found += [f"{prefix}.{alias.name}" for alias in names]
    return found


def at_run_time(source: str) -> str:
    """The source without what only type checkers read."""
    tree = ast.parse(source)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.unparse(tree)


def place(path: str) -> str:
    """corpus/sources.py -> corpus; cli.py -> cli."""
    return path.split("/")[0].removesuffix(".py")


def broken_floors(sources: Sources) -> list[str]:
    broken = []
    for path, source in sources.items():
        here = place(path)
        if path != "__init__.py" and here not in FLOORS:
            broken.append(f"{path} stands on no floor")
            continue
        # The public door names all floors, and loads none of them by itself.
        for name in imports(at_run_time(source) if path == "__init__.py" else source):
            if name.startswith("."):
                broken.append(f"{path} imports {name}: write it from nmt on")
            parts = name.split(".")
            if parts[0] != "nmt":
                continue
            there = parts[1] if len(parts) > 1 else ""
            if name == "nmt" and FLOORS[here] >= FLOORS["cli"]:
                continue  # for its version
            if path == "__init__.py" or there not in FLOORS:
                broken.append(f"{path} imports {name}")
                continue
            lower = FLOORS[there] < FLOORS[here]
            neighbour = FLOORS[there] == FLOORS[here] and FLOORS[here] in NEIGHBOURLY
            if not (lower or neighbour or there == here):
                broken.append(f"{path} imports {name}")
    return broken


def importers(sources: Sources, library: str) -> list[str]:
    """Files that import a library; tensorboard may come by way of torch."""
    names = (library, f"torch.utils.{library}")
    return [
        path
        for path, source in sources.items()
        if any(f"{found}.".startswith(f"{name}.") for found in imports(source) for name in names)
    ]


def broken_libraries(sources: Sources) -> list[str]:
    broken = []
    for library in ONE_FILE_EACH:
        found = importers(sources, library)
        if len(found) > 1:
            broken.append(f"{library} is imported in {', '.join(found)}")
    for library, home in ONLY_IN.items():
        broken += [f"{library} is imported in {path}" for path in importers(sources, library) if path != home]
    return broken


def broken_lengths(sources: Sources) -> list[str]:
    broken = []
    for path, source in sources.items():
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            broken.append(f"{path} has {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    broken.append(f"{path}: {node.name} has {lines} lines")
    return broken


@pytest.fixture(scope="module")
def sources() -> Sources:
    found = read_sources()
    assert {"config/model.py", "model/seq2seq.py", "decoding/search.py"} <= found.keys()
    return found


def test_imports_go_down(sources: Sources):
    assert broken_floors(sources) == []


def test_each_library_is_known_to_one_file(sources: Sources):
    assert broken_libraries(sources) == []


def test_files_and_functions_are_short(sources: Sources):
    assert broken_lengths(sources) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("corpus/sources.py", "from nmt.model import lstm"),
        ("model/lstm.py", "import nmt.corpus.sources"),
        ("config/model.py", "from nmt.run import Run"),
        ("model/lstm.py", "def f():\n    from nmt.decoding.search import beam_search"),
        ("run.py", "from nmt import decoding"),
        ("run.py", "import nmt"),
        ("decoding/search.py", "from nmt.evaluation.scores import bleu"),
        ("evaluation/scores.py", "from nmt.training.loop import train"),
        ("training/loop.py", "from nmt.cli import main"),
        ("training/loop.py", "from .data import batches"),
        ("training/loop.py", "from nmt.utils import helper"),
        ("utils.py", ""),
        ("__init__.py", "from nmt.config import Config"),
        ("__init__.py", "def f():\n    from nmt.config import Config"),
    ],
)
def test_a_broken_floor_is_seen(path: str, source: str):
    assert len(broken_floors({path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/prepared.py", "from nmt.config import Config\nfrom nmt.data.shards import write"),
        ("run.py", "from nmt.checkpoint import save\nfrom nmt.model.lstm import LSTM"),
        ("config/model.py", "from nmt.errors import UserError"),
        ("cli.py", "from nmt.training.loop import train"),
        ("cli.py", "from nmtools import x"),
        ("__init__.py", "if TYPE_CHECKING:\n    from nmt.api import load"),
    ],
)
def test_a_kept_floor_passes(path: str, source: str):
    assert broken_floors({path: source}) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"a.py": "import sentencepiece", "b.py": "from sentencepiece import X"},
        {"a.py": "from torch.utils import tensorboard", "b.py": "from torch.utils.tensorboard import X"},
        {"a.py": "def f():\n    import datasets", "b.py": "import datasets.load as d"},
        {"run.py": "from hydra import compose"},
        {"cli.py": "import hydra"},
        {"config/model.py": "import omegaconf"},
        {"data/prepared.py": "import babel.numbers"},
    ],
)
def test_a_library_out_of_its_file_is_seen(sources: Sources):
    assert len(broken_libraries(sources)) == 1


def test_length_is_seen():
    assert broken_libraries({"a.py": "import datasets, babelfish", "compose.py": "import hydra"}) == []
    assert broken_lengths({"a.py": "x = 1\n" * 450}) == []
    assert len(broken_lengths({"a.py": "x = 1\n" * 451})) == 1
    assert broken_lengths({"a.py": "def f():\n" + "    x = 1\n" * 79}) == []
    assert len(broken_lengths({"a.py": "class A:\n  def f():\n" + "    x = 1\n" * 80})) == 1
