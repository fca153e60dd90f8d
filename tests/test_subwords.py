"""The SentencePiece vocabulary: special ids, odd text, determinism, errors."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.batch import BOS, EOS, PAD, UNK
from nmt.config import SubwordConfig
from nmt.data.subwords import Subwords, train_subwords

SPECIAL = ["</s>", "<pad>", "<s>", "<unk>", "<0x0A>", "a</s>b<s>"]
WORDS = ["ein", "Hund", "über", "die", "grüne", "Wiese", "sucht", "Ball"]


def sentences(seed: int = 0, count: int = 300) -> list[str]:
    generator = np.random.default_rng(seed)
    syllables = generator.choice(["ba", "de", "gi", "lo", "mu", "nü", "rä", "sö", "ta", "wi"], (40, 3))
    words = [*WORDS, *("".join(word) for word in syllables)]
    lines = [" ".join(generator.choice(words, generator.integers(2, 9))) for _ in range(count)]
    # SentencePiece does not learn from what looks like its own tokens: their characters need another line.
    return [*lines, *SPECIAL * 20, *["a / b < 0 x 0 > A < p k < s / k >"] * 20]


def trained(folder: Path, kind: str = "bpe", vocab_size: int = 80) -> Path:
    path = folder / f"{kind}.model"
    train_subwords(sentences(), SubwordConfig(kind=kind, vocab_size=vocab_size), path)
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subwords:
    return Subwords.load(trained(tmp_path_factory.mktemp("vocabulary"), request.param))


def test_round_trip(subwords: Subwords) -> None:
    text = "die grüne Wiese sucht über Hund"
    ids = subwords.encode(text)
    assert ids.min() > EOS
    assert subwords.decode(ids) == text
    assert "".join(subwords.pieces(ids)).replace("▁", " ").strip() == text
    assert subwords.size == 80
    assert subwords.pieces([PAD, UNK, BOS, EOS]) == ["<pad>", "<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_are_ordinary_text(subwords: Subwords, text: str) -> None:
    ids = subwords.encode(text)
    assert ids.min() > EOS
    assert subwords.decode(ids) == text


def test_batches_equal_single_texts(subwords: Subwords) -> None:
    texts = ["ein Hund", "", "  ", "\u3000", "🦆", "\ud800 Ball", "x" * 5000, *sentences(1, 50)]
    together = subwords.encode_batch(texts)
    assert [len(ids) for ids in together[1:4]] == [0, 0, 0]
    assert all(np.array_equal(ids, subwords.encode(text)) for ids, text in zip(together, texts, strict=True))
    assert subwords.encode_batch([]) == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_text_gives_special_ids_or_a_line_break(subwords: Subwords, text: str) -> None:
    ids = subwords.encode(text)
    assert not set(ids.tolist()) & {PAD, BOS, EOS}
    decoded = subwords.decode(ids)
    assert len(decoded.splitlines()) <= 1


def test_decoding_any_ids(subwords: Subwords) -> None:
    ids = np.random.default_rng(0).integers(0, subwords.size, 2000)
    assert len(subwords.decode(ids).splitlines()) == 1
    assert subwords.decode([]) == ""
    assert subwords.decode([BOS, PAD, EOS]) == ""
    assert subwords.decode([UNK]).strip() == "⁇"


def test_line_breaks_become_blanks(tmp_path: Path) -> None:
    breaks = "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    path = tmp_path / "m"
    config = SubwordConfig(kind="bpe", vocab_size=24, normalisation="identity", character_coverage=1.0)
    train_subwords([f"Hund{character}Ball" for character in breaks] * 20, config, path)
    subwords = Subwords.load(path)
    for character in breaks:
        ids = subwords.encode(f"Hund{character}Ball")
        assert UNK not in ids
        assert subwords.decode(ids) == "Hund Ball"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, kind: str) -> None:
    first = trained(tmp_path, kind).read_bytes()
    assert trained(tmp_path, kind).read_bytes() == first
    other = tmp_path / "other"
    train_subwords(sentences(5), SubwordConfig(kind=kind, vocab_size=80), other)
    assert Subwords.load(other).fingerprint != Subwords(first).fingerprint


def test_unsuitable_sizes_name_the_key_and_the_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus.subwords.vocab_size=9999 is too large .* at most \d+ p"):
        trained(tmp_path, vocab_size=9999)
    with pytest.raises(ValueError, match=r"corpus.subwords.vocab_size=16 is too small.* need \d+ pieces"):
        trained(tmp_path, vocab_size=16)
    with pytest.raises(ValueError, match="no text to learn"):
        train_subwords([], SubwordConfig(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_broken_models_are_named(tmp_path: Path) -> None:
    good = trained(tmp_path)
    with pytest.raises(ValueError, match=r"nothing\.model cannot be read"):
        Subwords.load(tmp_path / "nothing.model")
    for number, data in enumerate((b"", b"junk" * 100, good.read_bytes()[:100])):
        path = tmp_path / f"broken{number}"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=path.name) as caught:
            Subwords.load(path)
        assert "\n" not in str(caught.value)
