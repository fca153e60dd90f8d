"""nmt compare: scores, buckets and pairs of several systems, where translations come from, and the page."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

import nmt.evaluation.scores
from nmt.evaluation.buckets import by_label, by_length, by_numbers
from nmt.evaluation.compare import KEPT_NAMES, LEAST_SENTENCES, MOST_PAIRS, Compared, System, compare
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.sets import EvaluationSet
from nmt.pages.compare import comparison_page
from nmt.run import RunDirectory
from nmt.text.checks import KEPT
from tests.test_experts_page import Page
from tests.toy import Cli

SOURCES = [f"the small dog runs over meadow {i} {'and on ' * (i % 5)}" for i in range(100)]
REFERENCES = [f"der kleine Hund läuft über Wiese {i} {'und weiter ' * (i % 5)}".strip() for i in range(100)]
GOOD = [line if i % 10 else line.replace("Hund", "Kater") for i, line in enumerate(REFERENCES)]
BAD = [line if i % 3 else line.replace("kleine", "große") for i, line in enumerate(REFERENCES)]
HOSTILE = [
    "<script>alert('x')</script>",
    "</dd></article></main></body></html><!--",
    "&lt;b&gt; &amp; \"'",
    "bell\x07 escape\x1b[31m nul\x00 tab\t end",
    "line\u2028separator\u2029\x85next",
    "\u202eevil right to left override",
    "سطر من اليمين إلى اليسار 12",
    "",
]


@pytest.fixture(autouse=True)
def _few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.evaluation.scores, "RANDOMISATION_TRIALS", 200)


def a_set(sources: list[str] = SOURCES, references: list[str] = REFERENCES) -> EvaluationSet:
    return EvaluationSet("test", "test", sources, [references], [])


def compared(*hypotheses: list[str], text: EvaluationSet | None = None, **options: bool) -> Compared:
    text = text or a_set()
    systems = [System(f"system {place}", f"file {place}", each) for place, each in enumerate(hypotheses)]
    domains = ["few" if place < LEAST_SENTENCES - 1 else "many" for place in range(len(text.sources))]
    groupings = [by_length(text.sources), by_numbers(text.sources), by_label("domain", "Domain", "", domains)]
    return compare(text, systems, groupings, "13a", **options)


# --------------------------------------------------------------------------------------------------- figures


def test_a_system_against_itself() -> None:
    found = compared(GOOD, GOOD, ter=True)
    assert list(found.overall) == ["BLEU", "chrF2", "TER"]
    for first, second in found.overall.values():
        assert first == second
        assert (second.result.difference, second.result.interval) == (0.0, (0.0, 0.0))
        assert (second.bootstrap, second.randomisation) == (1.0, 1.0)
    (versus,) = found.versus
    assert (versus.better, versus.worse, versus.identical, versus.wins, versus.losses) == (0, 0, 100, [], [])


@pytest.mark.slow
def test_scores_are_those_of_evaluate_and_differences_change_sign_with_the_order() -> None:
    one, other = compared(BAD, GOOD), compared(GOOD, BAD)
    for score in corpus_scores(GOOD, [REFERENCES], "13a"):
        bad, good = one.overall[score.name]
        assert good.result.score == score.value
        assert one.signatures[score.name] == score.signature
        assert good.result.difference == good.result.score - bad.result.score > 0
        assert good.score_interval[0] < score.value < good.score_interval[1]
        assert good.bootstrap < 0.05
        assert good.randomisation < 0.05
        turned = other.overall[score.name][1].result
        assert turned.difference == -good.result.difference
        assert turned.interval == pytest.approx((-good.result.interval[1], -good.result.interval[0]))
    (versus,), (turned_versus,) = one.versus, other.versus
    assert (versus.better, versus.worse) == (turned_versus.worse, turned_versus.better)
    assert [pair.place for pair in versus.wins] == [pair.place for pair in turned_versus.losses]


def test_buckets_add_up_and_small_ones_are_not_scored() -> None:
    found = compared(BAD, GOOD, REFERENCES)
    for grouping in found.groupings:
        assert sum(bucket.sentences for bucket in grouping.buckets) == len(SOURCES)
        for bucket in grouping.buckets:
            assert bool(bucket.results) == (bucket.sentences >= LEAST_SENTENCES)
            assert all(len(results) == 3 for results in bucket.results.values())
    domains = found.groupings[2]
    assert [(bucket.label, bucket.sentences) for bucket in domains.buckets] == [("many", 71), ("few", 29)]
    many = domains.buckets[0].results["BLEU"]
    for system, hypotheses in enumerate((BAD, GOOD, REFERENCES)):
        assert many[system].score == corpus_scores(hypotheses[29:], [REFERENCES[29:]], "13a")[0].value


def test_the_largest_wins_and_losses() -> None:
    found = compared(BAD, GOOD)
    (versus,) = found.versus
    gains = dict.fromkeys(range(100), 0.0)
    for place in gains:
        before, after = (corpus_scores([each[place]], [[REFERENCES[place]]], "13a")[1].value for each in (BAD, GOOD))
        gains[place] = after - before
    assert versus.better == sum(gain > 0 for gain in gains.values()) > MOST_PAIRS
    assert versus.worse == sum(gain < 0 for gain in gains.values()) == len(versus.losses)
    assert versus.identical == sum(first == second for first, second in zip(BAD, GOOD, strict=True))
    for pairs, sign in ((versus.wins, 1), (versus.losses, -1)):
        ranked = sorted((place for place in gains if sign * gains[place] > 0), key=lambda place: -sign * gains[place])
        assert [pair.place for pair in pairs] == ranked[:MOST_PAIRS]
        assert all(pair.system - pair.baseline == gains[pair.place] for pair in pairs)


@pytest.mark.slow
def test_kept_numbers_are_counted() -> None:
    wrong = [line.replace("1", "2") for line in REFERENCES]
    found = compared(REFERENCES, wrong)
    assert list(found.kept) == ["numbers"]
    good, bad = found.kept["numbers"]
    assert good == (100, 100)
    assert bad == (sum("1" not in line for line in REFERENCES), 100)
    text = a_set([line.replace("meadow", "meadow <b>") for line in SOURCES])
    assert list(compared(REFERENCES, wrong, text=text).kept) == ["numbers", "tag"]
    words = Page(comparison_page(found)).words()
    assert "Kept from the source" in words
    assert "81%" in words


def test_every_kind_that_is_kept_has_a_name() -> None:
    assert tuple(KEPT_NAMES) == KEPT


def test_json_holds_every_figure() -> None:
    found = compared(BAD, GOOD, REFERENCES, ter=True)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["tests"] == {"seed": 12345, "bootstrap": 1000, "randomisation": 10000}
    for metric, results in found.overall.items():
        for each, written in zip(results, read["overall"][metric], strict=True):
            assert written["result"]["score"] == each.result.score
            assert written["bootstrap"] == each.bootstrap
    assert [each["system"] for each in read["against_baseline"]] == ["system 1", "system 2"]
    assert [each["name"] for each in read["buckets"]] == ["length", "numbers", "domain"]


# --------------------------------------------------------------------------------------------------- the page


def test_the_page_has_every_figure_and_sentence_and_needs_nothing_else() -> None:
    found = compared(BAD, GOOD, ter=True)
    html = comparison_page(found)
    page = Page(html)
    words = page.words()
    assert "http" not in html
    assert "url(" not in html
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    for results in found.overall.values():
        for each in results:
            assert f"{each.result.score:.2f}" in words
    for grouping in found.groupings:
        assert grouping.title in words
        for bucket in grouping.buckets:
            assert bucket.label in words
    assert words.count("too few sentences to score") == sum(
        not bucket.results for grouping in found.groupings for bucket in grouping.buckets
    )
    assert page.tags["article"] == len(found.versus[0].wins) + len(found.versus[0].losses)
    for pair in (*found.versus[0].wins, *found.versus[0].losses):
        assert SOURCES[pair.place] in words
        assert REFERENCES[pair.place] in words
    assert page.values("a", "href") == [f"#{name}" for name in page.values("section", "id")]
    assert all(signature in words for signature in found.signatures.values())


def test_differing_words_are_marked() -> None:
    page = Page(comparison_page(compared(BAD, GOOD)))
    marked = {word for tag, word in page.texts if tag == "mark"}
    assert {"große", "kleine", "Hund", "Kater"} <= marked
    assert not marked & {"der", "läuft", "Wiese"}


@pytest.mark.slow
def test_figures_are_coloured_by_what_is_better() -> None:
    """A lower TER is better."""
    for hypotheses, kind in (((BAD, REFERENCES), "gain"), ((REFERENCES, BAD), "loss")):
        page = Page(comparison_page(compared(*hypotheses, ter=True)))
        kinds = set(page.values("circle", "class"))
        assert kind in kinds
        assert not kinds & ({"gain", "loss"} - {kind})


def test_hostile_text_is_harmless() -> None:
    size = len(HOSTILE)
    sources = [f"{text} {place}" for place, text in enumerate(HOSTILE)] * 5
    text = EvaluationSet("test", "<b>title</b>", sources, [["a b c d"] * (5 * size)], [])
    systems = [System("<i>A</i>", "x</td>", ["a b c"] * (5 * size)), System("B & C", "y", HOSTILE * 5)]
    groupings = [by_label("domain", "Domain", "<p>", HOSTILE * 5)]
    html = comparison_page(compare(text, systems, groupings, "13a"))
    page = Page(html)
    assert not page.tags.keys() & {"script", "b<", "img"}
    assert "alert" in page.words()
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    shown = html.replace("<mark>", "").replace("</mark>", "")
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in shown
    assert "\x1b" not in html
    assert "\x00" not in html
    assert "line\u2028separator" in shown
    # Every sentence is a block with a direction of its own, so that none turns its neighbours.
    assert page.values("dd", "dir") == ["auto"] * page.tags["dd"]
    assert "<i>A</i>" not in html


def test_a_very_long_sentence_is_shown_in_part() -> None:
    long = "wort " * 4000
    found = compared(GOOD, [long, *GOOD[1:]], text=a_set())
    html = comparison_page(found)
    assert "15,000 more characters" in html
    assert len(html) < 200_000


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def files(run: Path, tmp_path: Path) -> Path:
    """The test set of a run in files, with two translations and domains, and a copy of the run."""
    sources, targets, _ = RunDirectory(run).text("test")
    worse = [line.replace("Hund", "Katze") for line in targets]
    domains = [f"domain {place % 2}" for place in range(len(sources))]
    for name, lines in (("s.en", sources), ("r.de", targets), ("good.de", targets), ("bad.de", worse), ("d", domains)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "report", ignore_errors=True)
    return tmp_path


def test_files_are_compared(files: Path, cli: Cli) -> None:
    arguments = ["compare", str(files / "bad.de"), str(files / "good.de"), "--tokenize", "intl"]
    arguments += ["--source", str(files / "s.en"), "--reference", str(files / "r.de"), "--domains", str(files / "d")]
    assert cli(*arguments, "-o", str(files / "p.html"), "--json", str(files / "c.json")) == 0, cli.err
    assert "good.de" in cli.out
    assert "seed 12345" in cli.out
    assert "tok:intl" in cli.out
    read = json.loads((files / "c.json").read_text())
    for metric, (bad, good) in read["overall"].items():
        assert good["result"]["score"] == pytest.approx(100.0), metric
        assert good["result"]["difference"] > 0
        assert f"{bad['result']['score']:.2f}" in cli.out
        assert read["signatures"][metric] in cli.out
    by_name = {each["name"]: each for each in read["buckets"]}
    assert [(each["label"], each["sentences"]) for each in by_name["domain"]["buckets"]] == [
        ("domain 0", 6),
        ("domain 1", 6),
    ]
    assert "the sources of the test set" in by_name["rare_words"]["note"]
    assert "expert" not in by_name
    Page((files / "p.html").read_text())
    assert cli(*arguments) == 0
    assert "no page was written" in cli.err


@pytest.mark.slow
def test_runs_are_compared_with_what_evaluate_kept(files: Path, cli: Cli) -> None:
    copy = str(files / "copy")
    assert cli("evaluate", copy) == 0
    kept = (files / "copy" / "report" / "test.hypotheses").read_text().split("\n")[:-1]
    assert (
        cli("compare", copy, f"{copy},decoding.checkpoint=2", f"{copy},decoding.beam_size=1", str(files / "good.de"))
        == 0
    )
    assert "copy: translations kept by nmt evaluate" in cli.err
    assert cli.err.count(": translating 12 sentences") == 2
    names = ["copy", "copy (decoding.checkpoint=2)", "copy (decoding.beam_size=1)", "good.de"]
    assert all(f"  {name} " in cli.out for name in names)
    (page,) = (files / "copy" / "report").glob("compare-*.html")
    words = Page(page.read_text()).words()
    assert "step 8, beam 4" in words
    assert "step 2, beam 4" in words
    assert "beam 1" in words
    assert "the training text of copy (80 sentences)" in words
    assert "Most-used expert" in words
    assert "The expert of encoder.1 in A" in words
    score = corpus_scores(kept, [RunDirectory(files / "copy").text("test")[1]], "13a")[0].value
    assert f"  copy                          {score:>6.2f}" in cli.out


def test_settings_of_all_runs(files: Path, cli: Cli) -> None:
    copy = str(files / "copy")
    written = files / "c.json"
    arguments = ["compare", copy, f"{copy},decoding.beam_size=3", "decoding.beam_size=2", "--json", str(written)]
    assert cli(*arguments, "--layer", "decoder.1", "--split", "dev") == 0, cli.err
    read = json.loads(written.read_text())
    assert ["beam 2" in read["systems"][0]["origin"], "beam 3" in read["systems"][1]["origin"]] == [True, True]
    (experts,) = (each for each in read["buckets"] if each["name"] == "expert")
    assert "decoder.1 in A" in experts["note"]
    assert "translation by A" in experts["note"]
    assert sum(bucket["sentences"] for bucket in experts["buckets"]) == read["sentences"] == 8


@pytest.mark.slow
def test_an_export_and_a_pipe_are_systems_too(files: Path, cli: Cli) -> None:
    copy, exported = str(files / "copy"), str(files / "exported")
    assert cli("export", copy, exported) == 0
    os.mkfifo(files / "pipe")
    good = (files / "good.de").read_bytes()
    writer = threading.Thread(target=(files / "pipe").write_bytes, args=(good,))
    writer.start()
    assert cli("compare", copy, exported, str(files / "pipe"), "--json", str(files / "c.json")) == 0, cli.err
    writer.join()
    assert "another test set" not in cli.err
    baseline, same, other = json.loads((files / "c.json").read_text())["overall"]["chrF2"]
    assert same["result"] == baseline["result"]
    assert other["result"]["score"] == pytest.approx(100.0)


@pytest.mark.slow
def test_a_run_with_another_test_set_translates_that_of_the_first(files: Path, cli: Cli) -> None:
    text = files / "copy" / "text"
    (text / "test.source").write_text((text / "test.source").read_text().replace("dog", "fox", 1))
    first = shutil.copytree(files / "copy", files / "first")
    shutil.copyfile(files / "s.en", first / "text" / "test.source")
    assert cli("compare", str(first), str(files / "copy")) == 0, cli.err
    assert "copy has another test set of its own: it translates that of the first run" in cli.err


def test_the_same_file_twice_has_two_names(files: Path, cli: Cli) -> None:
    good = str(files / "good.de")
    arguments = ["--source", str(files / "s.en"), "--reference", str(files / "r.de"), "--json", str(files / "c.json")]
    assert cli("compare", good, good, good, *arguments) == 0, cli.err
    names = [each["name"] for each in json.loads((files / "c.json").read_text())["systems"]]
    assert names == [good, f"{good} #2", f"{good} #3"]


def test_a_name_with_a_line_break_stays_on_its_line(files: Path, cli: Cli) -> None:
    odd = files / "a\nb.de"
    shutil.copyfile(files / "good.de", odd)
    arguments = ["--source", str(files / "s.en"), "--reference", str(files / "r.de")]
    assert cli("compare", str(odd), str(files / "bad.de"), *arguments) == 0, cli.err
    assert "BLEU    a b.de " in cli.out


@pytest.mark.parametrize(
    ("status", "arguments", "says"),
    [
        (2, ["{0}/good.de"], ("1 system", "give 2 to 26")),
        (2, ["{0}/good.de", "{0}/bad.de"], ("need --source F and --reference F",)),
        (2, ["{0}/good.de", "{0}/bad.de", "--source", "{0}/s.en"], ("need --source F and --reference F",)),
        (
            2,
            ["{0}/good.de", "{0}/bad.de", "--source", "{0}/s.en", "--reference", "{0}/r.de", "decoding.alpha=1"],
            ("decoding.alpha=1", "settings are for runs"),
        ),
        (4, ["{0}/copy", "{0}/nothing"], ("nothing is neither a file of translations nor a run",)),
        (2, ["{0}/good.de,decoding.beam_size=1", "{0}/copy"], ("is a file of translations", "no setting")),
        (2, ["{0}/copy,decoding.beam_size=0", "{0}/copy"], ("decoding.beam_size",)),
        (2, ["{0}/copy,training.seed=3", "{0}/copy"], ("only decoding.* may be changed",)),
        (2, ["{0}/copy", "{0}/good.de", "--layer", "encoder.7"], ("encoder.7", "encoder.1, decoder.1")),
        (2, ["{0}/good.de", "{0}/copy", "--layer", "encoder.1"], ("--layer encoder.1", "no MoE layer")),
        (2, ["{0}/copy", "{0}/good.de", "-o", "{0}/good.de"], ("-o", "another file of this command")),
        (2, ["{0}/copy", "{0}/good.de", "-o", "{0}/x", "--json", "{0}/x"], ("--json", "another file of this command")),
        (3, ["{0}/copy", "{0}/d", "--split", "dev"], ("d has 12 lines but dev has 8",)),
        (
            3,
            ["{0}/copy", "{0}/good.de", "--domains", "{0}/copy/text/dev.source"],
            ("--domains", "has 8 lines"),
        ),
    ],
)
def test_mistakes(files: Path, cli: Cli, status: int, arguments: list[str], says: tuple[str, ...]) -> None:
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    cli.refuses(status, "compare", *(each.format(files) for each in arguments), says=says, progress=True)
    assert {path: path.read_bytes() for path in files.iterdir() if path.is_file()} == before


def test_too_many_sentences(files: Path, cli: Cli) -> None:
    (files / "long").write_text("a\n" * 10_001)
    name = str(files / "long")
    arguments = ["--source", name, "--reference", name]
    cli.refuses(3, "compare", name, name, *arguments, says=("10,001 sentences", "at most 10,000"))
