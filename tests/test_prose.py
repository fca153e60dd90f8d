"""Plain English: forms that a native reader has to read twice, and sentences that are too long.

Pages are read whole, except for code and quotations. Of nmt/ and scripts/, docstrings, comments and messages are read.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*.md")])
PAGES += sorted((ROOT / "docs").glob("*.ipynb"))
MOST_WORDS = 30
"""Of a sentence on a page."""

_COUNTED = (
    "bytes?|tokens?|pairs?|words?|experts?|steps?|micro-batch(?:es)?|sentences?|subwords?|positions?|operations?|rows?|"
    "threads?|seconds?|minutes?|milliseconds?|tokens_per_second|FLOPs|[GMk]B|ms"
)
_MEASURES = "token|GPU|side|pair|sentence|layer|second|minute|hour|line|core|host|process|piece|position|batch|step|run"
BANNED = {
    r"\b(go|goes|going|gone|went) on\b": "resume, continue",
    r"\btrain(s|ed|ing)? on with\b": "resume",
    r"\b(tell|tells|telling|told)\b": "report, print, show, decide",
    r"\b(says|said)\b": "reports, prints, shows",
    r"\b(wake|wakes|waking|woken|woke)\b": "active experts",
    r"\b(stand|stands|stood)\b": "is, is in, is written in",
    rf"\b({_COUNTED}) an? ({_MEASURES})\b": "per",
    r"\b[0-9]+([,.][0-9]+)*[a-z%]* an? (token|GPU|side|pair|second|minute|hour|core|step)\b": "per",
    r"\bin vain\b": "for nothing",
    r"\bso many\b": "this many, that many",
    r"\bof (which|whom) (one|each|every|all|no)\b": "whose, where",
    r"\bnobody's\b": "discarded",
    r"\bgoes before\b": "takes precedence over",
    r"\bfor ever\b": "permanently",
}
"""Regular expressions of what is not written, and what is written instead."""


def blocks(markdown: str) -> Iterator[tuple[int, str]]:
    """(line from 1, text) of each paragraph, item, heading and cell of a page; code and quotations are left out."""
    fenced, start, gathered = False, 0, list[str]()
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        if line.startswith(("```", "<!--")):
            fenced = fenced != line.startswith("```")
            line = ""
        # Others wrote what is quoted: sentences of a corpus, and their translations.
        line = "" if line.startswith(">") else line
        if fenced:
            continue
        if not line.strip() or re.match(r"\s*([-*]|\d+\.|#+|\|) ?", line):
            if gathered:
                yield start, " ".join(gathered)
            gathered = []
        if line.startswith("|"):
            yield from ((number, cell) for cell in re.split(r"(?<!\\)\|", line) if cell.strip("- "))
        elif line.strip():
            start = start if gathered else number
            gathered.append(re.sub(r"^\s*([-*]|\d+\.|#+) ", "", line).strip())


def words_of(text: str) -> str:
    """Text without code, addresses and markup; a piece of code counts as one word."""
    text = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*]", "", text)


def sentences(text: str) -> list[str]:
    """The sentences of a block."""
    return re.split(r"(?<=[.!?])\s+(?=\w)", re.sub(r"\b(e\.g|i\.e|eq|vs)\.", "e", text))


def banned(text: str) -> list[str]:
    """What is found of the banned forms, with what is written instead."""
    return [
        f"{found[0]!r} (write: {instead})"
        for form, instead in BANNED.items()
        for found in re.finditer(form, text, flags=re.IGNORECASE)
    ]


def prose_of_code(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings and messages, which are strings with a blank in them, and of the comments."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values):
                parts |= {id(value) for value in values}
                text = "".join(str(each.value) if isinstance(each, ast.Constant) else "X" for each in values)
            case ast.Constant(str(text)) if id(node) not in parts:
                pass
            case _:
                continue
        if " " in text:
            yield node.lineno, words_of(" ".join(text.split()))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_pages_are_plain(page: Path):
    found = []
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    for line, block in blocks(text):
        text = words_of(block)
        found += [f"line {line}: {each}" for each in banned(text)]
        for sentence in sentences(text):
            count = len(re.findall(r"[\w'’-]*\w[\w'’-]*", sentence))
            if count > MOST_WORDS:
                found.append(f"line {line}: {count} words: {sentence}")
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_words_of_code_are_plain():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {each}"
        for folder in ("nmt", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in prose_of_code(path.read_text())
        for each in banned(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "the same command goes on from there",
        "what a person is told",
        "experts that each token wakes",
        "100 bytes a pair",
        "2k tokens a side",
        "1.9 million operations a second",
        "8 experts a layer",
        "one micro-batch a GPU",
        "a sentence a line",
        "takes 35 ms a step",
        "one line says so",
    ],
)
def test_a_banned_form_is_seen(text: str):
    assert banned(text)


@pytest.mark.parametrize(
    "text",
    [
        "runs on a GPU",
        "32 experts per token",
        "a line of text",
        "two hosts and a GPU of 24 GB",
    ],
)
def test_plain_words_pass(text: str):
    assert not banned(text)


def test_parts_of_a_page():
    page = "# A b\n\nOne.\nTwo `x y` three.\n\n- item\n  more\n- next\n\n"
    page += "```\ncode goes on\n```\n\n> he said so\n\n| a | b c |\n|---|---|\n"
    assert [text for _, text in blocks(page)] == [
        "A b",
        "One. Two `x y` three.",
        "item more",
        "next",
        " a ",
        " b c ",
    ]
    assert sentences(words_of("One. Two `x y` [three](z.md), e.g. this.")) == ["One.", "Two CODE three, e this."]


def test_words_of_a_program():
    source = '"""Doc string."""\nx = f"a {y} message"  # a comment\nz = "key"\n'
    assert [text for _, text in prose_of_code(source)] == ["Doc string.", "a X message", "# a comment"]
