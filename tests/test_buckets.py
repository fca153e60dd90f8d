"""Buckets of sentences: every sentence is in exactly one, and in the right one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nmt.decoding.loading import load_vocabulary
from nmt.evaluation import frequency
from nmt.evaluation.buckets import Grouping, by_label, by_length, by_numbers, by_rare_words
from nmt.evaluation.frequency import source_frequencies, training_frequencies
from nmt.run import RunDirectory
from nmt.text.words import words

SOURCES = [" ".join(f"word{chr(97 + i % 7)}" for i in range(n % 31)) for n in range(200)] + ["", "7 + 8", "٣ कमरे"]


def labels(grouping: Grouping, size: int) -> list[str]:
    """The label of each sentence; each must be in one bucket."""
    places = [place for bucket in grouping.buckets for place in bucket.places]
    assert sorted(places) == list(range(size))
    assert all(bucket.places == sorted(bucket.places) for bucket in grouping.buckets)
    found = {place: bucket.label for bucket in grouping.buckets for place in bucket.places}
    return [found[place] for place in range(size)]


def test_lengths_lie_in_the_ranges_of_their_labels() -> None:
    grouping = by_length(SOURCES)
    for source, label in zip(SOURCES, labels(grouping, len(SOURCES)), strict=True):
        low, *high = (int(part) for part in label.split(" word")[0].split(" to "))
        assert low <= len(source.replace("+", " ").split()) <= (high or [low])[0]
    assert grouping.buckets[0].label.startswith("0 to ")
    sizes = [len(bucket.places) for bucket in grouping.buckets]
    assert len(sizes) == 6
    assert all(20 <= size <= 60 for size in sizes[:4])
    assert sizes[-1] <= 15


def test_equal_lengths_are_one_bucket() -> None:
    assert by_length(["a", "b", "c"]).buckets == [("1 word", [0, 1, 2])]
    assert by_length(["a b"]).buckets == [("2 words", [0])]
    assert by_length(["我们走"]).buckets == [("3 words", [0])]


def test_the_rarest_word_decides() -> None:
    counts = {"the": 5000, "old": 999, "dog": 100, "sees": 10, "a": 9, "red": 2, "fox": 1}
    sources = ["The", "the old", "the dog", "The old, sees!", "a the", "the red a", "Fox the", "the yak", "7:30", ""]
    grouping = by_rare_words(sources, counts, "some text")
    expected = ["1,000 times or more", "100 to 999 times", "100 to 999 times", "10 to 99 times", "2 to 9 times"]
    expected += ["2 to 9 times", "once", "never", "no word", "no word"]
    assert labels(grouping, len(sources)) == expected
    assert [bucket.label for bucket in grouping.buckets][:2] == ["never", "once"]
    assert "some text" in grouping.note


def test_digits_of_any_script_are_numbers() -> None:
    assert labels(by_numbers(SOURCES), len(SOURCES))[-3:] == ["without digits", "with digits", "with digits"]


def test_labels_make_buckets_the_largest_first() -> None:
    given = ["b", "a", "c", "a", "b", "<i>", "a"]
    grouping = by_label("domain", "Domain", "", given)
    assert labels(grouping, len(given)) == given
    assert [bucket.label for bucket in grouping.buckets] == ["a", "b", "<i>", "c"]


# --------------------------------------------------------------------------------------------------- frequencies


def test_words_are_counted_in_the_training_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(run)
    subwords = load_vocabulary(directory)
    config = directory.config()
    lines = (run.parent / "train.en").read_text().splitlines()
    found = training_frequencies(directory, config, subwords)
    assert found is not None
    assert found.counts == Counter(word for line in lines for word in words(line))
    assert found.where == f"the training text of run ({len(lines)} sentences)"
    monkeypatch.setattr(frequency, "MOST_PAIRS", 10)
    part = training_frequencies(directory, config, subwords)
    assert part is not None
    assert "10 of the " in part.where
    chosen = np.unique(np.linspace(0, len(lines) - 1, 10).astype(int))
    assert part.counts == Counter(word for place in chosen for word in words(lines[place]))


def test_another_text_is_not_the_training_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(run)
    subwords = load_vocabulary(directory)
    monkeypatch.setattr(directory, "corpus_info", lambda: {"fingerprint": "0" * 64})
    assert training_frequencies(directory, directory.config(), subwords) is None


def test_without_training_text_the_sources_are_counted() -> None:
    found = source_frequencies(["The dog", "the fox 7"])
    assert found == ({"the": 2, "dog": 1, "fox": 1}, "the sources of the test set")
