"""Encoding word by word gives exactly the subwords of whole lines, and what the program loads to prepare text."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.config import SubwordConfig
from nmt.data.shards import ids_dtype
from nmt.data.subwords import Subwords, train_subwords
from nmt.data.word_cache import WordEncoder

LINES = [
    "the small dog runs over a green meadow this morning and looks",
    "der kleine Hund läuft über eine grüne Wiese am Morgen und sucht 1,234 m² ½",
    "l’élan «vu» à l'œil… naïve café",
    "日本語 の 文 も ある 。 ＡＢＣ",
    "ἀρχή γῆ ά é ñ",
]
# What normalisation, blanks and special signs could do across words.
NASTY = "ab  \t\u00a0\u3000\u2028\u0085\0\u0301\u0308\u200b\ufeff▁▅\ufdd0éé½ﬁＡ日本 ά’…\ud800.12"
KINDS = [(kind, rule) for kind in ("bpe", "unigram") for rule in ("nfc", "nmt_nfkc", "nfkc", "identity")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda each: "-".join(each))
def subwords(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subwords:
    kind, rule = request.param
    path = tmp_path_factory.mktemp("vocabulary") / "subwords.model"
    config = SubwordConfig(kind=kind, vocab_size=150 if kind == "bpe" else 70, normalisation=rule)
    train_subwords(LINES * 20, config, path)
    return Subwords.load(path)


def expected(subwords: Subwords, texts: list[str]) -> tuple[list[int], list[int]]:
    cut = subwords.encode_batch(texts)
    return [piece for ids in cut for piece in ids.tolist()], list(map(len, cut))


@pytest.mark.slow
@settings(max_examples=150)
@given(texts=st.lists(st.text(NASTY, max_size=30), max_size=8), most=st.sampled_from([1, 5, 1000]))
def test_ids_are_those_of_whole_lines(subwords: Subwords, texts: list[str], most: int) -> None:
    encoder = WordEncoder(subwords, most)
    for some in (texts, texts[::-1], texts + LINES):  # with a cache that is cold, warm, and too small
        cut = encoder.encode(some)
        ids, lengths = expected(subwords, some)
        assert (cut.ids.tolist(), cut.lengths.tolist()) == (ids, lengths)
        assert cut.ids.dtype == ids_dtype(subwords.size)
        assert len(cut.num_words) == len(some)


def test_counts_for_the_report(subwords: Subwords) -> None:
    encoder = WordEncoder(subwords)
    assert subwords.cuts_words_apart == subwords.is_bpe
    texts = ["the  small dog", "", "xyz the", "Ωmega"]
    cut = encoder.encode(texts)
    assert cut.num_words.tolist() == [3, 0, 2, 1]
    assert cut.num_whole == sum(len(subwords.encode(word)) == 1 for text in texts for word in text.split())
    blanks = ["the\u00a0dog\u202f!", "\u2028", " a\tb  c\u200b"]
    assert encoder.encode(blanks).num_words.tolist() == [len(text.split()) for text in blanks] == [3, 0, 3]
    strange = encoder.is_byte[subwords.encode("Ω")]
    assert strange.tolist() == ["<0x" in piece for piece in subwords.pieces(subwords.encode("Ω").tolist())]
    assert strange.sum() == 2
    empty = encoder.encode([])
    assert (len(empty.ids), len(empty.lengths), empty.num_whole) == (0, 0, 0)
    assert empty.lengths.dtype == np.int32


def test_preparing_loads_neither_torch_nor_other_large_libraries() -> None:
    """Each process of a preparation would need their memory."""
    code = (
        "import sys, nmt.preparation.encoding, nmt.preparation.cleaning, nmt.preparation.prepare\n"
        "print([name for name in ('torch', 'pandas', 'datasets', 'pyarrow', 'hydra') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
