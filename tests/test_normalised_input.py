"""Runs with corpus.punctuation=moses read any text as if its punctuation had been normalised beforehand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import nmt
from nmt.config import Direction
from nmt.data.prepared import Prepared, prepared_path
from nmt.decoding.normalising import between_blanks
from nmt.decoding.translation import Translation
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, DataError
from nmt.evaluation.measure import measure
from nmt.evaluation.scores import Score, all_scores
from nmt.evaluation.sets import EvaluationSet
from nmt.experts.explain import explain_sentence
from nmt.run import RunDirectory
from nmt.students.taught import lessons, only_part
from nmt.students.teacher import Taught, Teacher
from nmt.text.markup import outside_items
from nmt.text.punctuation import normaliser, origins
from nmt.text.terms import Terms
from tests.many import train_many
from tests.toy import Cli, toy_config, train, write_corpus

ENGLISH, GERMAN = normaliser("moses", "en"), normaliser("moses", "de")
SOURCES = [
    "“the small dog”, ‘runs’ over a meadow…",
    "the dog’s ( green ) meadow — 5 % of this morning .",
    "«\u00a0the dog\u00a0» looks\u00a0: this\u00a0; morning\u00a0!",
    "the small dog runs over a meadow",
]
TARGETS = [
    "„der kleine Hund“, ‚läuft‘ über eine Wiese…",
    "die Wiese ( grüne ) — 5 % am Morgen .",
    "«\u00a0der Hund\u00a0» sucht\u00a0!",
    "der kleine Hund läuft über eine Wiese",
]
assert [ENGLISH(text) for text in SOURCES[:3]] == [
    "\"the small dog,\" 'runs' over a meadow...",
    "the dog's (green) meadow - 5% of this morning .",
    '"the dog" looks: this; morning!',
]


@pytest.fixture(scope="module")
def moses(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of all tests, as if its corpus had been normalised."""
    folder = tmp_path_factory.mktemp("moses") / "run"
    shutil.copytree(run, folder, symlinks=True)
    settings = (folder / "config.yaml").read_text()
    assert settings.count("punctuation: keep") == 1
    (folder / "config.yaml").write_text(settings.replace("punctuation: keep", "punctuation: moses"))
    return folder


def load(run: Path, *, beam_size: int = 2) -> Translator:
    directory = RunDirectory.existing(str(run))
    config = directory.config()
    return Translator.load(directory, replace(config, decoding=replace(config.decoding, beam_size=beam_size)))


def shown(found: list[Translation]) -> list[dict[str, object]]:
    return [each.to_dict(pieces=True, words=True) for each in found]


@pytest.mark.slow
def test_translations_are_those_of_normalised_text(run: Path, moses: Path) -> None:
    keep, normal = load(run), [ENGLISH(text) for text in SOURCES]
    expected = shown(keep.translate(normal))
    assert shown(load(moses).translate(SOURCES)) == expected
    assert shown(load(moses).translate(normal)) == expected
    # Otherwise the test shows nothing.
    assert shown(keep.translate(SOURCES)) != expected


def test_lines_of_other_runs_do_not_change(run: Path) -> None:
    assert load(run).as_read(SOURCES) == SOURCES


def test_lines_without_words_are_returned_unchanged(moses: Path) -> None:
    lines = ["“…”", " — ", "“%s”", "<b>’</b>", "“жук”"]
    assert [each.text for each in load(moses).translate(lines)] == lines


def test_tags_and_fields_stay(moses: Path) -> None:
    translator = load(moses)
    tag, url = '<a title="“x”, ( y )">', "https://example.org/a(b)’c…d"
    line = f"{tag}“the dog”,</a> runs over {url} …"
    assert translator.as_read([line]) == [f'{tag}"the dog,"</a> runs over {url} ...']
    found = translator.translate([line])[0].text
    assert tag in found
    assert url in found
    plain = replace(translator.options, markup=False)
    assert translator.as_read([line], plain) == [ENGLISH(line)] != translator.as_read([line])


def test_items_stay_whatever_is_in_the_line() -> None:
    line = "\U000f0000’ <b>a’</b> {x}’"
    assert outside_items(line, ENGLISH) == "\U000f0000' <b>a'</b> {x}'"


def test_blanks_at_the_ends_of_lines_stay(moses: Path) -> None:
    assert between_blanks("  “a”\n\n\t ‘b’  \n", ENGLISH) == "  \"a\"\n\n\t 'b'  \n"
    translator = load(moses)
    options = replace(translator.options, paragraphs=True)
    text = "“the dog” runs.\n\n  ‘a meadow’"
    expected = load(moses).translate(["\"the dog\" runs.\n\n  'a meadow'"], options)
    assert translator.translate([text], options) == expected
    assert "\n\n  " in expected[0].text


def test_prefixes_begin_translations_as_the_model_writes_them(run: Path, moses: Path) -> None:
    expected = load(run).translate(["the dog"], prefixes={0: '"der "'})
    found = load(moses).translate(["the dog"], prefixes={0: "„der “"})
    assert found == expected
    assert found[0].text.startswith('"der "')
    # Tags of a line with a prefix are translated like text.
    assert load(moses).as_read(["<b>a</b>(“b”"] * 2, begun=[1]) == ['<b>a</b> ("b"', '<b>a</b> ("b"']
    assert load(moses).as_read(['<a b="“">c'] * 2, begun=[1]) == ['<a b="“">c', ENGLISH('<a b="“">c')]


def test_terms_are_found_in_either_spelling(run: Path, moses: Path) -> None:
    lines = ["the dog’s meadow", "the dog's meadow"]
    expected = load(run).translate(lines[1:], terms=[[Terms.of({"dog's": "Hund's"})]])
    for table in ({"dog’s": "Hund’s"}, {"dog's": "Hund's"}, {"dog’s": "Hund’s", "dog's": "Hund's"}):
        found = load(moses).translate(lines, terms=[[Terms.of(table)]] * 2)
        assert [each.text for each in found] == [expected[0].text] * 2
        assert "Hund's" in found[0].text
    kept = load(moses).translate(lines, terms=[[Terms.of({"dog’s": None})]] * 2)
    assert all("dog's" in each.text for each in kept)
    with pytest.raises(DataError, match=r"terms\[\"dog's\"\]: the source term \"dog's\" is in terms\['dog’s'\], too"):
        load(moses).translate(lines, terms=[[Terms.of({"dog’s": "Hund", "dog's": "Wiese"})]] * 2)


@pytest.mark.parametrize("text", [*SOURCES, "a—b", "''a'' `b` c…", "x ) . 1\u00a02 <b>y</b>"])
def test_letters_come_from_the_same_letters(text: str) -> None:
    new = ENGLISH(text)
    places = origins(text, new)
    assert len(places) == len(new)
    assert places == sorted(places)
    assert all(text[place] == each for place, each in zip(places, new, strict=True) if each.isalnum())
    marks = [text[place] for place, each in zip(places, new, strict=True) if not (each.isalnum() or each.isspace())]
    assert not any(mark.isspace() for mark in marks[1:])


def test_alignments_count_the_words_of_the_given_line(run: Path, moses: Path) -> None:
    # Six words, of which the model reads four.
    line = "the dog\u00a0: 5 % (\u00a0meadow )"
    translator, keep = load(moses), load(run)
    options = replace(translator.options, alignments=True)
    [found], [read] = translator.translate([line], options), keep.translate([ENGLISH(line)], options)
    given, normal = line.split(), ENGLISH(line).split()
    assert found.text == read.text
    assert read.alignment
    for (source, target), (place, other) in zip(found.alignment, read.alignment, strict=True):
        assert target == other
        assert "".join(filter(str.isalnum, given[source])) == "".join(filter(str.isalnum, normal[place]))


def test_pairs_are_scored_as_normalised_ones(run: Path, moses: Path) -> None:
    normal = [ENGLISH(text) for text in SOURCES], [GERMAN(text) for text in TARGETS]
    expected = nmt.load(run, device="cpu").score(*normal)
    assert nmt.load(moses, device="cpu").score(SOURCES, TARGETS) == expected
    assert nmt.load(run, device="cpu").score(SOURCES, TARGETS) != expected


def test_the_command_scores_normalised_pairs(run: Path, moses: Path, tmp_path: Path, cli: Cli) -> None:
    normal = [ENGLISH(text) for text in SOURCES], [GERMAN(text) for text in TARGETS]
    for name, lines in zip(("a.en", "a.de", "b.en", "b.de"), (SOURCES, TARGETS, *normal), strict=True):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    outputs = []
    for folder, name in ((moses, "a"), (run, "b"), (run, "a")):
        assert cli("score", str(folder), str(tmp_path / f"{name}.en"), str(tmp_path / f"{name}.de")) == 0, cli.err
        outputs.append(cli.out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_references_stay_for_bleu_and_are_normalised_for_perplexity(run: Path, moses: Path) -> None:
    seen: list[list[list[str]]] = []

    def scorer(hypotheses: list[str], references: list[list[str]]) -> list[Score]:
        seen.append(references)
        return all_scores(hypotheses, references, tokenizer="13a")

    config = RunDirectory.existing(str(moses)).config()
    found = measure(load(moses), EvaluationSet("test", "test", SOURCES, [TARGETS], []), scorer, config)
    normal = EvaluationSet("test", "test", [*map(ENGLISH, SOURCES)], [[*map(GERMAN, TARGETS)]], [])
    expected = measure(load(run), normal, scorer, config)
    assert seen[0] == [TARGETS]
    assert found.hypotheses == expected.hypotheses
    assert found.perplexity == expected.perplexity


def test_experts_and_explanations_read_normalised_text(run: Path, moses: Path) -> None:
    normal = [ENGLISH(text) for text in SOURCES], [GERMAN(text) for text in TARGETS]
    assert nmt.load(moses, device="cpu").experts(SOURCES, TARGETS) == nmt.load(run, device="cpu").experts(*normal)
    assert explain_sentence(load(moses), SOURCES[0]) == explain_sentence(load(run), normal[0][0])


@pytest.mark.slow
def test_each_direction_has_the_punctuation_of_its_languages(tmp_path: Path) -> None:
    many = train_many(tmp_path, steps=1)
    settings = (many / "config.yaml").read_text()
    (many / "config.yaml").write_text(settings.replace("punctuation: keep", "punctuation: moses"))
    translator = load(many)
    directions = [Direction("en", "de"), Direction("de", "en")]
    text = "“a”, “b”,"
    read = translator.pairs([text] * 2, [text] * 2, directions=directions)
    assert read.sources == read.targets[::-1] == [ENGLISH(text), GERMAN(text)]
    assert ENGLISH(text) != GERMAN(text)
    for direction, source in zip(directions, read.sources, strict=True):
        assert translator.as_read([text], replace(translator.options, direction=direction)) == [source]


def test_an_ensemble_of_other_punctuation_is_refused(run: Path, moses: Path, cli: Cli) -> None:
    with pytest.raises(CheckpointError, match=r"has corpus\.punctuation=keep, .* it should join has .*=moses"):
        nmt.load(moses, ensemble=[run])
    nmt.load(moses, ensemble=[moses])


def test_a_teacher_reads_its_own_punctuation(run: Path, moses: Path) -> None:
    teacher, plain = (Teacher(each, each.config(), "best") for each in (RunDirectory(moses), RunDirectory(run)))
    subwords, direction = plain.translator.subwords, Direction("en", "de")
    given, normal = (subwords.encode_batch(lines) for lines in (SOURCES, [*map(ENGLISH, SOURCES)]))
    assert teacher.teach(given, given, subwords, direction) == plain.teach(normal, normal, subwords, direction)
    rows = teacher.probabilities(given, normal, subwords, direction)
    assert (rows == plain.probabilities(normal, normal, subwords, direction)).all()


def test_a_student_learns_the_punctuation_of_its_corpus(
    run: Path, shared_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared.open(prepared_path(toy_config(shared_text).corpus))
    teacher = Teacher(RunDirectory(run), RunDirectory(run).config(), "best")
    texts = [TARGETS[0]] * len(only_part(prepared).shards)
    monkeypatch.setattr(teacher, "teach", lambda sources, *_: Taught(texts[: len(sources)], {}))
    monkeypatch.setattr(teacher, "probabilities", lambda _sources, targets, *_: targets)
    subwords = prepared.subwords()
    for punctuation, text in (("keep", TARGETS[0]), ("moses", GERMAN(TARGETS[0]))):
        monkeypatch.setitem(prepared.manifest["corpus"], "punctuation", punctuation)
        found = lessons(teacher, prepared, word_level=True)(range(2), lambda _: None)
        assert found.teacher_N is not None
        assert [subwords.decode(ids.tolist()) for ids in found.teacher_N] == [text] * 2


@pytest.mark.slow
def test_training_and_commands_see_normalised_text(tmp_path: Path, cli: Cli) -> None:
    """Perplexity in training, and translations of files. An exported model does the same."""
    found: dict[str, tuple[list[float], str]] = {}
    for name in ("moses", "keep"):
        folder = tmp_path / name
        write_corpus(folder, count=30)
        for split, count in (("dev", 3), ("test", 4)):
            for language, texts, normalise in (("en", SOURCES, ENGLISH), ("de", TARGETS, GERMAN)):
                chosen = [text if name == "moses" else normalise(text) for text in texts[:count]]
                (folder / f"{split}.{language}").write_text("".join(f"{text}\n" for text in chosen))
        run = train(folder, "run", 2, f"corpus.punctuation={name}", "training.validate_every=1")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        perplexities = [line["perplexity"] for line in lines if line["kind"] == "dev"]
        assert cli("evaluate", str(run), "--json") == 0, cli.err
        assert cli("translate", str(run), str(folder / "test.en")) == 0, cli.err
        own = cli.out
        exported = folder / "exported"
        assert cli("export", str(run), str(exported)) == 0, cli.err
        assert cli("translate", str(exported), str(folder / "test.en")) == 0, cli.err
        found[name] = (perplexities, own)
        assert cli.out == own
        assert len(perplexities) == 2
    assert found["moses"] == found["keep"]
