"""A teacher's translations as training text: in parts, by several processes, after a kill, of several vocabularies."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

import nmt.students.parts
from nmt.cli import main
from nmt.config import Direction
from nmt.data.prepared import Prepared
from nmt.data.subwords import Subwords
from nmt.data.symbols import Symbols
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.preparation.prepare import prepare
from nmt.run import RunDirectory
from nmt.students.parts import Parts
from nmt.students.taught import lesson_of, lessons, only_part, taught_corpus, taught_path
from nmt.students.teacher import Taught, Teacher
from nmt.text.checks import loop
from tests.many import WORDS, settings_of_many, train_many, write_texts
from tests.toy import toy_config, train

EN_DE = Direction("en", "de")


@pytest.fixture(scope="module")
def teacher(shared_text: Path) -> Path:
    """A run that has learned to end its translations, and that repeats itself now and then."""
    rare = [f"training.{name}=1000" for name in ("validate_every", "checkpoint_every", "log_every")]
    return train(shared_text, "teacher", 60, "training.learning_rate=0.02", *rare)


def lines_of(prepared: Prepared, side: str) -> list[str]:
    """The text of a side of the training pairs."""
    [part] = prepared.parts()
    shards = part.shards
    pairs = range(len(shards))
    return prepared.subwords().decode_batch([getattr(shards, side)(pair).tolist() for pair in pairs])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------ a teacher


class Search:
    """A searcher with given hypotheses, in place of a model's: texts of a vocabulary, best first."""

    def __init__(self, subwords: Subwords, found: list[list[str]], unfinished: tuple[str, ...] = ()) -> None:
        self.subwords, self.found, self.unfinished = subwords, found, unfinished
        self.sources: list[np.ndarray] = []
        self.symbols: list[tuple[int, ...]] = []

    def search(
        self, sources: list[np.ndarray], options: Any, _progress: Any = None, symbols: tuple[int, ...] = ()
    ) -> list[list[Hypothesis]]:
        if options.no_repeat_ngram:  # the second search
            return [self._hypotheses(["again"] * 2)[: options.n_best] for _ in sources]
        first = len(self.sources)
        self.sources += sources
        self.symbols += [symbols] * len(sources)
        found = self.found[first : first + len(sources)]
        return [self._hypotheses(each)[: options.n_best] for each in found]

    def _hypotheses(self, texts: list[str]) -> list[Hypothesis]:
        return [
            Hypothesis(self.subwords.encode(text).tolist(), -float(rank), [], None, text not in self.unfinished)
            for rank, text in enumerate(texts)
        ]


@pytest.fixture
def taught(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Taught]:
    """What a teacher makes of sources and references, given what its search finds."""
    directory = RunDirectory(run)

    def teach(
        found: list[list[str]],
        sources: list[str],
        references: list[str],
        choose: str = "best",
        retry: bool = True,
        unfinished: tuple[str, ...] = (),
    ) -> Taught:
        teacher = Teacher(directory, directory.config(), choose)
        teacher.options = replace(teacher.options, retry=retry)
        subwords = teacher.translator.subwords
        teacher.translator.searcher = Search(subwords, found, unfinished)
        return teacher.teach(*(subwords.encode_batch(side) for side in (sources, references)), subwords, EN_DE)

    return teach


FOUND = [
    ["der Hund", "ein kleiner Hund", "der kleine Hund läuft"],
    ["eine Wiese", "die grüne Wiese", "Wiese am Morgen"],
]


@pytest.mark.parametrize("choose", ["chrf", "bleu"])
def test_the_choice_is_the_one_most_like_the_reference(taught: Callable[..., Taught], choose: str) -> None:
    references = ["der kleine Hund läuft am Morgen", "die grüne Wiese"]
    metric = {"chrf": sacrebleu.sentence_chrf, "bleu": sacrebleu.sentence_bleu}[choose]
    expected = [
        max(each, key=lambda text, reference=reference: metric(text, [reference]).score)
        for each, reference in zip(FOUND, references, strict=True)
    ]
    assert expected == ["der kleine Hund läuft", "die grüne Wiese"]
    sources = ["the small dog", "a green meadow"]
    assert taught(FOUND, sources, references, choose) == Taught(expected, {})
    assert taught(FOUND, sources, references).texts == ["der Hund", "eine Wiese"]


def test_equally_good_ones_are_in_the_order_of_the_search(taught: Callable[..., Taught]) -> None:
    assert taught([["Hund", "Wiese"]], ["dog"], ["am Morgen"], "bleu").texts == ["Hund"]


@pytest.mark.parametrize("choose", ["best", "chrf"])
def test_a_translation_in_trouble_is_searched_again_and_then_not_taught(
    taught: Callable[..., Taught], choose: str
) -> None:
    loops = "der der der der der der"
    assert loop("the dog", loops)
    found, sources, references = [[loops, loops], ["Hund", loops]], ["the dog", "dog"], [loops, loops]
    assert taught(found, sources, references, choose).texts == ["again", "Hund"]
    assert taught(found, sources, references, choose, retry=False) == Taught([None, "Hund"], {"trouble": 1})


def test_a_translation_without_an_end_or_a_word_is_not_taught(taught: Callable[..., Taught]) -> None:
    found = [["Hund", "Wiese"], ["Hund", "Hund"], [""]]
    sources = ["dog", "dog", "dog"]
    assert taught(found, sources, sources, "chrf", False, ("Hund",)) == Taught(
        ["Wiese", None, None], {"cut": 1, "trouble": 1}
    )


def test_sources_that_a_teacher_cannot_read_keep_their_references(run: Path) -> None:
    directory = RunDirectory(run)
    teacher = Teacher(directory, directory.config(), "best")
    subwords = teacher.translator.subwords
    dog, slot = subwords.encode("the dog"), np.array([subwords.symbol("slot", 1)], dtype=np.int32)
    most = teacher.translator.max_pieces()
    sources = [dog, np.concatenate([dog, slot]), dog[:0], np.resize(dog, most + 1), np.resize(dog, most)]
    found = teacher.teach(sources, sources, subwords, EN_DE)
    assert {key: found.kept[key] for key in ("symbols", "length")} == {"symbols": 1, "length": 2}
    assert found.texts[1:4] == [None] * 3


def test_the_symbol_of_the_target_language_is_before_the_source(run: Path) -> None:
    directory = RunDirectory(run)
    teacher = Teacher(directory, directory.config(), "best")
    subwords = teacher.translator.subwords
    known = teacher.translator.directions
    assert known
    teacher.translator.directions = replace(known, symbols=Symbols(("en", "de"), ("bt",)))
    search = Search(subwords, [["Hund"]] * 3)
    teacher.translator.searcher = search
    dog = subwords.encode("dog")
    for tag in ("", "bt", "captions"):  # the last is unknown to the teacher
        teacher.teach([dog], [dog], subwords, EN_DE, tag)
    language, bt = subwords.symbol("language", 1), subwords.symbol("tag", 0)
    # Apart from the source, as nmt translate gives them: they need no coverage.
    assert [each.tolist() for each in search.sources] == [[*dog]] * 3
    assert search.symbols == [(language,), (language, bt), (language,)]
    with pytest.raises(UserError, match="does not translate en-fr; it has: en-de"):
        teacher.teach([dog], [dog], subwords, Direction("en", "fr"))


def test_likeness_is_measured_in_the_target_language(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(run)
    teacher = Teacher(directory, directory.config(), "bleu")
    subwords = teacher.translator.subwords
    known = teacher.translator.directions
    assert known
    to_chinese = Direction("en", "zh")
    teacher.translator.directions = replace(known, trained=(*known.trained, to_chinese))
    teacher.translator.searcher = Search(subwords, [["Hund", "Wiese"]])
    asked: list[str] = []
    monkeypatch.setattr(
        "nmt.students.teacher.likeness", lambda _, name: lambda texts, _: asked.append(name) or [1.0] * len(texts)
    )
    dog = subwords.encode("dog")
    teacher.teach([dog], [dog], subwords, to_chinese)
    assert asked == ["zh"]


# ---------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("num_pairs", "size", "count"), [(1, 16, 1), (80, 16, 5), (6400, 200, 32), (10**6, 20_000, 50)]
)
def test_parts_hold_every_pair_once(tmp_path: Path, num_pairs: int, size: int, count: int) -> None:
    parts = Parts(tmp_path / "whole", num_pairs)
    assert (parts.size, parts.count) == (size, count)
    assert [pair for number in range(parts.count) for pair in parts.pairs(number)] == [*range(num_pairs)]


def test_parts_that_are_done_are_not_made_again(tmp_path: Path) -> None:
    made: list[range] = []

    def make(pairs: range, _progress: Callable[[float], None]) -> Taught:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(pairs)
        return Taught([f"text {pair}" for pair in pairs], {"cut": len(made)})

    parts = Parts(tmp_path / "whole", 96)
    with pytest.raises(KeyboardInterrupt):
        parts.fill(make, print)
    assert parts.num_done() == 2
    before = made.copy()
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        parts.fill(make, print)
    parts.fill(lambda pairs, _progress: Taught([None] * len(pairs), {}), print)
    assert [*before, *made] == [parts.pairs(number) for number in range(4)]
    assert parts.num_done() == 6
    assert parts.read(1) == Taught([f"text {pair}" for pair in range(16, 32)], {"cut": 2})
    assert {path.suffix for path in parts.folder.iterdir()} == {".json"}


def test_several_processes_share_the_parts(tmp_path: Path) -> None:
    """Here they are threads; a lock is that of a file. Each part is made once, and no one leaves before all are."""
    made: list[tuple[str, int]] = []
    both = threading.Barrier(2, timeout=60)
    numbers: dict[str, int] = {}

    def work(name: str) -> None:
        parts = Parts(tmp_path / "whole", 64)

        def make(pairs: range, _progress: Callable[[float], None]) -> Taught:
            if name not in numbers:
                both.wait()
            numbers[name] = numbers.get(name, 0) + 1
            made.append((name, pairs.start))
            return Taught([name] * len(pairs), {})

        parts.fill(make, lambda _line: None)
        numbers[f"{name} saw"] = parts.num_done()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(start for _, start in made) == [0, 16, 32, 48]
    assert {name for name, _ in made} == {"a", "b"}
    assert (numbers["a saw"], numbers["b saw"]) == (4, 4)


def test_nothing_is_made_once_the_whole_is_there(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "whole", 64)

    def make(pairs: range, _progress: Callable[[float], None]) -> Taught:
        assert not parts.whole.exists()
        parts.whole.mkdir()  # by another process
        return Taught([None] * len(pairs), {})

    parts.fill(make, print)
    assert parts.num_done() == 1


@pytest.mark.parametrize("content", ["", "{}", '{"texts": ["a"], "kept": {}}', '{"texts": [1], "kept": {}}'])
def test_a_damaged_part_is_named(tmp_path: Path, content: str) -> None:
    parts = Parts(tmp_path / "whole", 3)
    parts.folder.mkdir()
    parts.path(0).write_text(content)
    with pytest.raises(DataError, match=r"part-00000.json is damaged .* remove it"):
        parts.read(0)


def test_progress_has_the_speed_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 5.0, 10.0, 20.0])
    monkeypatch.setattr(nmt.students.parts.time, "monotonic", lambda: next(seconds))
    lines: list[str] = []

    def make(pairs: range, progress: Callable[[float], None]) -> Taught:
        if pairs.start == 0:
            progress(0.5)  # too early for a line
            progress(0.5)
            progress(1.0)
        return Taught([None] * len(pairs), {})

    Parts(tmp_path / "whole", 64).fill(make, lines.append)
    assert lines == [
        "8 of 64 pairs translated, 0.8 pairs/s, 70.0 seconds left",
        "16 of 64 pairs translated, 0.8 pairs/s, 60.0 seconds left",
    ]


# ----------------------------------------------------------------------------------------------- the taught corpus


def make_text(prepared: Prepared, run: Path, choose: str = "best", changes: tuple[str, ...] = ()) -> Prepared:
    """The taught corpus in this process."""
    directory = RunDirectory(run)
    config = directory.config(changes)
    lesson = lesson_of(prepared, directory, config, choose)
    return taught_corpus(prepared, lesson, lambda: lessons(Teacher(directory, config, choose), prepared), print)


@pytest.fixture
def own(shared_text: Path, tmp_path: Path) -> Prepared:
    """The prepared toy corpus in a folder of the test's own."""
    changes = (f"corpus.root={shared_text}", f"corpus.directory={tmp_path / 'p'}")
    return prepare(toy_config(shared_text, *changes).corpus, lambda _line: None)


def test_targets_are_those_that_the_teacher_translates_to(own: Prepared, teacher: Path) -> None:
    taught = make_text(own, teacher)
    directory = RunDirectory(teacher)
    sources = lines_of(own, "source")
    translations = Translator.load(directory, directory.config()).translate(sources)
    bad = [
        bool(loop(source, each.text)) or not (each.finished and each.text.strip())
        for source, each in zip(sources, translations, strict=True)
    ]
    pairs = zip(translations, lines_of(own, "target"), bad, strict=True)
    assert lines_of(taught, "target") == [reference if trouble else each.text for each, reference, trouble in pairs]
    assert 0 < sum(bad) < len(bad)
    assert sum(taught.manifest["taught"]["kept"].values()) == sum(bad)


def test_it_is_like_the_own_corpus_in_all_else(own: Prepared, teacher: Path) -> None:
    taught = make_text(own, teacher)
    taught.verify()
    assert lines_of(taught, "source") == lines_of(own, "source")
    assert taught.subwords().fingerprint == own.subwords().fingerprint
    assert [taught.text(split) for split in ("dev", "test")] == [own.text(split) for split in ("dev", "test")]
    assert taught.fingerprint != own.fingerprint
    assert [path.name for path in taught.path.parent.glob("*.parts")] == []


@pytest.mark.slow
def test_after_a_kill_the_rest_is_made_and_all_is_the_same(
    own: Prepared, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files_of(make_text(own, teacher).path)
    again = tmp_path / "again"
    again.mkdir()
    own.path.rename(again / own.path.name)
    own = Prepared.open(again / own.path.name)
    teach, calls = Teacher.teach, []

    def killed(*arguments: Any) -> Taught:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return teach(*arguments)

    monkeypatch.setattr(Teacher, "teach", killed)
    with pytest.raises(KeyboardInterrupt):
        make_text(own, teacher)
    assert len(list(again.glob("*.parts/*.json"))) == 2
    assert files_of(make_text(own, teacher).path) == whole
    assert len(calls) == 3 + 3
    make_text(own, teacher)
    assert len(calls) == 6


def test_another_lesson_has_another_folder(own: Prepared, teacher: Path) -> None:
    directory = RunDirectory(teacher)

    def path(choose: str, *changes: str) -> Path:
        return taught_path(own, lesson_of(own, directory, directory.config(changes), choose))

    paths = [
        path("best"),
        path("chrf"),
        path("best", "decoding.beam_size=2"),
        path("best", "decoding.checkpoint=last"),
        path("best", f"decoding.ensemble=[{teacher}]"),
    ]
    assert len(set(paths)) == 5
    assert path("best", "decoding.device=cpu", "decoding.batch_tokens=7") == paths[0]


@pytest.mark.slow
def test_an_ensemble_and_an_export_teach(own: Prepared, teacher: Path, tmp_path: Path) -> None:
    assert main(["export", str(teacher), str(tmp_path / "export")]) == 0
    alone, exported = make_text(own, teacher), make_text(own, tmp_path / "export")
    assert exported.path != alone.path
    assert lines_of(exported, "target") == lines_of(alone, "target")
    both = make_text(own, teacher, changes=(f"decoding.ensemble=[{tmp_path / 'export'}]",))
    assert lines_of(both, "target") == lines_of(alone, "target")


def test_a_student_of_another_vocabulary(shared_text: Path, tmp_path: Path, teacher: Path) -> None:
    changes = ("corpus.subwords.vocab_size=72", f"corpus.directory={tmp_path / 'p'}")
    other = prepare(toy_config(shared_text, f"corpus.root={shared_text}", *changes).corpus, lambda _line: None)
    same = prepare(toy_config(shared_text).corpus, lambda _line: None)
    assert other.subwords().size != same.subwords().size
    taught = make_text(other, teacher)
    assert taught.subwords().fingerprint == other.subwords().fingerprint
    directory = RunDirectory(teacher)
    translations = Translator.load(directory, directory.config()).translate(lines_of(other, "source"))
    new = [each.text for each in translations]
    kept = sum(text != each for text, each in zip(lines_of(taught, "target"), new, strict=True))
    assert kept == sum(taught.manifest["taught"]["kept"].values()) < len(new)


def test_a_translation_that_is_too_long_for_the_filter_is_not_taught(
    shared_text: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("corpus.filters.max_pieces=12", f"corpus.directory={tmp_path / 'p'}")
    small = prepare(toy_config(shared_text, f"corpus.root={shared_text}", *changes).corpus, lambda _line: None)
    texts = ["Hund " * 3 if pair % 2 else "Hund " * 40 for pair in range(len(small.parts()[0].shards))]
    monkeypatch.setattr(Teacher, "teach", lambda _self, sources, *_: Taught([texts.pop(0) for _ in sources], {}))
    taught = make_text(small, teacher)
    references = lines_of(small, "target")
    expected = ["Hund Hund Hund" if pair % 2 else reference for pair, reference in enumerate(references)]
    assert lines_of(taught, "target") == expected
    assert taught.manifest["taught"]["kept"] == {"filtered": -(-len(expected) // 2)}


def test_the_manifest_has_what_the_text_was_made_by(own: Prepared, teacher: Path) -> None:
    taught = json.loads((make_text(own, teacher).path / "manifest.json").read_text())["taught"]
    assert taught["choose"] == "best"
    assert taught["corpus"] == own.fingerprint
    assert taught["decoding"]["beam_size"] == 4
    assert len(taught["checkpoints"]) == 1


# --------------------------------------------------------------------------------------------- several directions


@pytest.mark.slow
def test_a_teacher_of_many_directions_teaches_one(tmp_path: Path) -> None:
    """The corpus of one direction, from other files than a teacher's, has its arrays under a name of its own."""
    many = train_many(tmp_path)
    texts = f"corpus.train.texts={{{', '.join(f'{code}: [train.{code}]' for code in WORDS)}}}"
    vocabulary = f"corpus.subwords.vocabulary={many}"
    one = (*settings_of_many(), texts, "corpus.train.tags=[]", "corpus.directions=[de-en]", vocabulary)
    own = prepare(toy_config(tmp_path, *one).corpus, lambda _line: None)
    directory = RunDirectory(many)
    teacher = Teacher(directory, directory.config(), "best")
    subwords = teacher.translator.subwords
    sources = lines_of(own, "source")
    targets = [[f"dog {pair}"] for pair in range(len(sources))]
    teacher.translator.searcher = Search(subwords, targets)
    lesson = lesson_of(own, directory, directory.config(), "best")
    taught = taught_corpus(own, lesson, lambda: lessons(teacher, own), print)
    [before], [after] = own.parts(), taught.parts()
    assert (after.direction, after.prefix) == (before.direction, before.prefix)
    assert after.direction == Direction("de", "en")
    assert lines_of(taught, "source") == sources
    assert [[line] for line in lines_of(taught, "target")] == targets
    taught.verify()


@pytest.mark.slow
def test_a_corpus_of_several_directions_or_tags_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    several = prepare(toy_config(tmp_path, *settings_of_many()).corpus, lambda _line: None)
    with pytest.raises(UserError, match="has 6 directions or tags, and nmt distill takes one"):
        only_part(several)
