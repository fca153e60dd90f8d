"""nmt evaluate on several sets, on translations made elsewhere, and beside sacreBLEU's own command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import sacrebleu

import nmt.decoding.translator
from nmt.evaluation.scores import all_scores
from nmt.evaluation.sets import Request, requests
from tests.toy import Cli

# What no reader of lines may split at, white space at both ends, empty lines, and letters that change with their case.
ODD = [
    ("Der Zug\rfährt um 14:35 Uhr ab.", "Der Zug fährt um 14:35 Uhr ab .", "Um 14:35 fährt\rder Zug."),
    ("eine\u2028grüne Wiese  ", "eine grüne\u2028Wiese", "die grüne Wiese\x85"),
    ("ein\x85kleiner Hund läuft", " ein kleiner\x85Hund läuft schnell", "der kleine Hund\x0brennt"),
    ("", "nichts", "gar nichts"),
    ("GRÖSSE zählt (sehr)!", "Größe zählt sehr!", "größe zählt (sehr)!\x1c"),
    ("etwas", "", ""),
    ("Preis: 1.234,50 €, 20%-ig", "Preis: 1.234,50 €, 20 %-ig", "Der Preis: 1,234.50€"),
    ("l'homme d'accord &quot;oui&quot;", "l' homme d'accord \"oui\"", "l’homme"),
    ("我们明天坐火车。", "我们明天坐火车去。", "明天我们坐火车。"),
    ("one two three four five six", "one two three four five six seven", "one two three four"),
]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Files of translations and of two references; the last line of one has no end, and one has CR LF."""
    names = []
    for place, (lines, end) in enumerate(zip(zip(*ODD, strict=True), ("\n", "\r\n", "\n"), strict=True)):
        path = tmp_path / f"side{place}"
        path.write_bytes(end.join(lines).encode() + (end.encode() if place else b""))
        names.append(str(path))
    return names


def command_line(*arguments: str, **environment: str) -> Any:
    """What sacreBLEU itself prints, with 12 digits; a single score comes without a list."""
    words = [sys.executable, "-m", "sacrebleu", *arguments, "-w", "12", "-f", "json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | environment)
    found = json.loads(done.stdout)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize(
    ("arguments", "num_references"),
    [((), 1), (("--tokenize", "intl"), 2), (("--tokenize", "zh", "--lowercase"), 2), (("--tokenize", "char"), 1)],
    ids=str,
)
def test_scores_are_those_of_sacrebleus_command_line(
    cli: Cli, texts: list[str], arguments: tuple[str, ...], num_references: int
) -> None:
    hypothesis, *references = texts[: 1 + num_references]
    sides = [word for reference in references for word in ("--reference", reference)]
    assert cli("evaluate", "--hypothesis", hypothesis, *sides, *arguments, "--ter", "--json") == 0, cli.err
    ours = {each["name"]: each for each in json.loads(cli.out)}
    theirs = command_line(*references, "-i", hypothesis, "-m", "bleu", "chrf", "ter", *arguments)
    theirs += command_line(*references, "-i", hypothesis, "-m", "chrf", "-cw", "2")
    assert [each["name"] for each in theirs] == ["BLEU", "chrF2", "TER", "chrF2++"]
    for each in theirs:
        found = ours[each["name"]]
        assert f"{found.pop('score'):.12f}" == f"{each.pop('score'):.12f}", each["name"]
        found.pop("set")
        assert found == each
    assert ours["multi-bleu"]["signature"] == ours["BLEU"]["signature"].replace("exp", "none")


def test_bytes_that_are_not_utf8_are_reported(cli: Cli, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("café\n".encode("latin-1") * Path(texts[1]).read_bytes().count(b"\n"))
    assert cli("evaluate", "--hypothesis", str(tmp_path / "latin"), "--reference", texts[1]) == 0
    note = "lines with bytes that are not UTF-8; they were replaced by U+FFFD: save the text as UTF-8\n"
    assert note in cli.err
    assert cli.err.startswith(f"{tmp_path / 'latin'}: ")


def test_the_table_has_the_digits_of_the_json(cli: Cli, texts: list[str]) -> None:
    arguments = ("evaluate", "--hypothesis", texts[0], "--reference", texts[1])
    assert cli(*arguments, "--json") == 0
    scores = json.loads(cli.out)
    assert cli(*arguments) == 0
    head, row, *_ = cli.out.splitlines()
    assert head.split() == ["set", "sentences", "references", *(each["name"] for each in scores)]
    assert row.split() == ["side0", "10", "1", *(f"{each['score']:.2f}" for each in scores)]


def test_multi_bleu_counts_the_tokens_of_bleu() -> None:
    hypotheses, references = ["The dog, the cat!"], [["The dog, the cat!"]]
    assert all_scores(hypotheses, references, "13a")[-1].details.endswith("hyp_len=6, ref_len=6)")
    assert all_scores(hypotheses, references, "none")[-1].details.endswith("hyp_len=4, ref_len=4)")
    upper = [[line.upper() for line in references[0]]]
    assert all_scores(hypotheses, upper, "13a")[-1].value == 0.0
    assert all_scores(hypotheses, upper, "13a", lowercase=True)[-1].value == pytest.approx(100.0)


# ------------------------------------------------------------------------------------------------- several sets


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", []),
        ("split:dev", [Request(split="dev")]),
        ("source:a reference:b", [Request(source="a", references=("b",))]),
        ("reference:b source:a reference:c", [Request(source="a", references=("b", "c"))]),
        (
            "source:a reference:b source:c reference:d reference:e",
            [Request(source="a", references=("b",)), Request(source="c", references=("d", "e"))],
        ),
        (
            "hypothesis:a reference:b hypothesis:c reference:d",
            [Request(hypothesis="a", references=("b",)), Request(hypothesis="c", references=("d",))],
        ),
        (
            "split:test split:dev set:wmt14 hypothesis:h source:a reference:b",
            [
                Request(split="test"),
                Request(split="dev"),
                Request(named="wmt14", hypothesis="h"),
                Request(source="a", references=("b",)),
            ],
        ),
    ],
)
def test_options_describe_sets_in_their_order(words: str, expected: list[Request]) -> None:
    assert requests([(word.split(":")[0], word.split(":")[1]) for word in words.split()]) == expected


@pytest.mark.slow
def test_several_sets_are_scored_and_kept_as_each_alone(cli: Cli, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report")))
    (tmp_path / "a").write_text("the dog\n")
    (tmp_path / "b").write_text("der Hund\n")
    files = ("--source", str(tmp_path / "a"), "--reference", str(tmp_path / "b"))
    assert cli("evaluate", str(copy), "--split", "test", *files, "--split", "dev", "--json") == 0, cli.err
    together = json.loads(cli.out)
    assert "BLEU tokeniser 13a" in cli.err
    assert sorted({each["set"] for each in together}) == ["a", "dev", "test"]
    reports = {path.name: json.loads(path.read_text()) for path in (copy / "report").glob("*.json")}
    assert {"test.json", "dev.json"} < reports.keys()
    for arguments in (("--split", "test"), files, ("--split", "dev")):
        assert cli("evaluate", str(copy), *arguments, "--json") == 0
        alone = json.loads(cli.out)
        assert alone == [each for each in together if each["set"] == alone[0]["set"]]
        report = next(each for each in reports.values() if each["title"] == alone[0]["set"])
        scores = {each["name"]: each["score"] for each in alone}
        assert {name: each["score"] for name, each in report["scores"].items()}.items() <= scores.items()
        assert report["bits_per_character"] == scores["bits per character"]


# ------------------------------------------------------------------------------------ translations made elsewhere


def test_translations_made_elsewhere_need_no_model(
    cli: Cli, run: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nmt.decoding.translator.Translator, "load", never)
    before = sorted((run / "report").glob("*")) if (run / "report").exists() else []
    translations = str(run / "text" / "test.target")
    assert cli("evaluate", str(run), "--hypothesis", translations) == 0, cli.err
    assert cli.out.splitlines()[1].split()[:4] == ["test,", "test.target", "12", "1"]
    assert "100.00" in cli.out
    elsewhere = ("--hypothesis", texts[0], "--reference", texts[1], "--reference", texts[2])
    assert cli("evaluate", *elsewhere, "--source", texts[1], "--show", "2") == 0, cli.err
    assert cli.out.count("source  ") == 2
    assert cli.out.count("reference  ") == 4
    assert sorted((run / "report").glob("*") if (run / "report").exists() else []) == before
    cli.refuses(3, "evaluate", str(run), "--hypothesis", texts[0], says=("test set", "has 12 lines", "side0 has 10"))
    cli.refuses(3, "evaluate", *elsewhere, "--source", translations, says=("has 12 lines", "has 10"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("without RUN", "--hypothesis F")),
        (("--hypothesis", "a"), ("without RUN",)),
        (("--source", "a", "--reference", "b"), ("without RUN",)),
        (("--set", "wmt14", "--hypothesis", "a"), ("without RUN",)),
        (("--reference", "a"), ("--reference a has no --source",)),
        (("--source", "a"), ("--source a has no --reference",)),
        (("--hypothesis", "-", "--reference", "-"), ("standard input",)),
        (("--hypothesis", "a", "--reference", "b", "decoding.beam_size=2"), ("decoding.beam_size=2", "without RUN")),
    ],
    ids=str,
)
def test_what_cannot_be_scored_without_a_run(cli: Cli, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    cli.refuses(2, "evaluate", *arguments, says=says)


@pytest.mark.parametrize("option", [("--ter",), ("--json",), ("--lowercase",), ("--split", "dev", "--split", "test")])
def test_the_dial_ignores_nothing(cli: Cli, run: Path, option: tuple[str, ...]) -> None:
    cli.refuses(2, "evaluate", str(run), "--dial", "1", *option, says=("--dial",))


# ------------------------------------------------------------------------------------------- sacreBLEU's named sets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of sacreBLEU, and no network."""
    folder = tmp_path / "cache"
    dataset = sacrebleu.DATASETS["wmt14"]
    monkeypatch.setattr(dataset, "_outdir", str(folder / "wmt14"))
    monkeypatch.setattr(dataset, "_rawdir", str(folder / "wmt14" / "raw"))
    monkeypatch.setattr(sacrebleu, "SACREBLEU_DIR", str(folder))

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return folder


def test_a_named_set_in_the_cache(cli: Cli, run: Path, tmp_path: Path, cache: Path) -> None:
    (cache / "wmt14").mkdir(parents=True)
    sides = {"src": ["the dog", "a meadow"], "ref": ["der Hund\u2028!", "eine Wiese am Morgen"], "docid": ["1", "1"]}
    for field in ("src", "ref", "docid", "genre", "origlang"):
        text = "".join(f"{line}\n" for line in sides.get(field, ["x", "x"]))
        (cache / "wmt14" / f"wmt14.en-de.{field}").write_text(text)
    hypothesis = tmp_path / "translated"
    hypothesis.write_text("der Hund\neine grüne Wiese am Morgen\n")
    named = ("evaluate", str(run), "--set", "wmt14")
    assert cli(*named, "--hypothesis", str(hypothesis), "--json") == 0, cli.err
    (bleu,) = (each for each in json.loads(cli.out) if each["name"] == "BLEU")
    (theirs,) = command_line("-t", "wmt14", "-l", "en-de", "-i", str(hypothesis), SACREBLEU=str(cache))
    assert f"{bleu['score']:.12f}" == f"{theirs['score']:.12f}"
    assert bleu["signature"] == theirs["signature"]
    assert bleu["set"] == "wmt14 en-de, translated"
    assert cli(*named) == 0, cli.err
    assert cli.out.splitlines()[1].startswith("wmt14 en-de          2           1  ")
    (report,) = (run / "report").glob("set-wmt14-en-de-*.json")
    assert json.loads(report.read_text())["source"]["path"].endswith("wmt14.en-de.src")


def test_a_named_set_that_is_missing_is_one_line(cli: Cli, run: Path, cache: Path) -> None:
    named = ("evaluate", str(run), "--set")
    says = ("--set wmt14", f"not in sacreBLEU's cache, {cache}", "no route to host", "--download wmt14 -l en-de")
    cli.refuses(3, *named, "wmt14", says=says)
    cli.refuses(2, *named, "wmt14x", says=("no such set", "did you mean wmt14", "sacrebleu --list"))


def test_a_named_set_without_the_languages_of_the_run(cli: Cli, run: Path) -> None:
    cli.refuses(2, "evaluate", str(run), "--set", "mtnt2019", says=("has no en-de", "en-fr, en-ja, fr-en, ja-en"))
