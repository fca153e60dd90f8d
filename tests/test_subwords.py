"""The SentencePiece vocabulary: special ids, odd text, determinism, errors."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.config import SubwordConfig
from nmt.data.subwords import RESERVED, Subwords, list_characters, train_subwords
from nmt.text.normalisation import CONTROLS
from nmt.tokens import BOS, EOS, PAD, UNK

SPECIAL = ["</s>", "<pad>", "<s>", "<unk>", "<0x0A>", "a</s>b<s>", "<language:0> <slot:15><term:3>", "<tag:0>"]
FIRST_BYTE, FIRST_LEARNED = 72, 328
WORDS = ["ein", "Hund", "über", "die", "grüne", "Wiese", "sucht", "Ball"]


def sentences(seed: int = 0, count: int = 300) -> list[str]:
    generator = np.random.default_rng(seed)
    syllables = generator.choice(["ba", "de", "gi", "lo", "mu", "nü", "rä", "sö", "ta", "wi"], (40, 3))
    words = [*WORDS, *("".join(word) for word in syllables)]
    lines = [" ".join(generator.choice(words, generator.integers(2, 9))) for _ in range(count)]
    return [*lines, *SPECIAL * 20]


def trained(folder: Path, kind: str = "bpe", vocab_size: int = 64) -> Path:
    path = folder / f"{kind}.model"
    train_subwords(sentences(), SubwordConfig(kind=kind, vocab_size=vocab_size), path)
    return path


def old_vocabulary(**settings: object) -> Subwords:
    """As versions before byte pieces made them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=80,
        **{"normalization_rule_name": "nmt_nfkc", **settings},
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        unk_surface="⁇",
        minloglevel=2,
    )
    return Subwords(model.getvalue())


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subwords:
    return Subwords.load(trained(tmp_path_factory.mktemp("vocabulary"), request.param))


def test_round_trip(subwords: Subwords) -> None:
    text = "die grüne Wiese sucht über Hund"
    ids = subwords.encode(text)
    assert ids.min() > EOS
    assert subwords.decode(ids) == text
    assert "".join(subwords.pieces(ids)).replace("▁", " ").strip() == text
    assert subwords.pieces([PAD, UNK, BOS, EOS]) == ["<pad>", "<unk>", "<s>", "</s>"]


def test_the_first_ids_are_special_reserved_and_bytes(subwords: Subwords) -> None:
    assert subwords.size == FIRST_LEARNED + 64 == SubwordConfig(vocab_size=64).num_pieces
    kinds = [subwords.reserved_ids(kind) for kind in RESERVED]
    assert [number for ids in kinds for number in ids] == list(range(EOS + 1, FIRST_BYTE))
    assert [len(ids) for ids in kinds] == [32, 16, 4, 8, 8]
    assert subwords.pieces(subwords.reserved_ids("slot"))[-1] == "<slot:15>"
    assert subwords.pieces(range(FIRST_BYTE, FIRST_LEARNED)) == [f"<0x{byte:02X}>" for byte in range(256)]


def test_what_may_never_be_output(subwords: Subwords) -> None:
    odd_bytes = {*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF5, 0x100)}
    expected = {PAD, UNK, BOS, *range(EOS + 1, FIRST_BYTE), *(FIRST_BYTE + byte for byte in odd_bytes)}
    assert set(subwords.forbidden_ids) == expected


def test_digits_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "m"
    config = SubwordConfig(kind="bpe", vocab_size=40)
    train_subwords(["year 2024 is 2024 and 12345 is 12345 ４５６ ٤٥٦ १२३\uf8ff"] * 50, config, path)
    pieces = Subwords.load(path).pieces(Subwords.load(path).encode("is 2024 12345 ４５６ ٤٥٦ १२३"))
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == [*"202412345４５６٤٥٦१२३"]
    assert Subwords.load(path).unlearned("2024 ４５６ ٤٥٦ १२३") == ""


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_are_ordinary_text(subwords: Subwords, text: str) -> None:
    ids = subwords.encode(text)
    assert ids.min() >= FIRST_BYTE
    assert subwords.decode(ids) == text


def test_batches_equal_single_texts(subwords: Subwords) -> None:
    texts = ["ein Hund", "", "  ", "\t\0", "🦆", "\ud800 Ball", "x" * 5000, *sentences(1, 50)]
    together = subwords.encode_batch(texts)
    assert [len(ids) for ids in together[1:4]] == [0, 0, 0]
    assert all(np.array_equal(ids, subwords.encode(text)) for ids, text in zip(together, texts, strict=True))
    assert subwords.encode_batch([]) == []


nasty = st.text(max_size=30) | st.text(
    alphabet="aü 12<>/s\u0301\u0323▁▅⁇\u200d\u200c\u00a0½⁶，🦆東\ufffd\ufeff", max_size=20
)


@settings(max_examples=200)
@given(nasty)
def test_any_text_comes_back(subwords: Subwords, text: str) -> None:
    ids = subwords.encode(text)
    assert not set(ids.tolist()) & {*subwords.forbidden_ids, EOS}
    assert subwords.decode(ids) == subwords.normalise(text)


@settings(max_examples=100)
@given(nasty)
def test_unlearned_characters_are_those_in_bytes(subwords: Subwords, text: str) -> None:
    in_bytes = bytes(number - FIRST_BYTE for number in subwords.encode(text).tolist() if number < FIRST_LEARNED)
    assert subwords.unlearned(text).encode() == in_bytes


@pytest.mark.parametrize("normalisation", ["nmt_nfkc", "nfkc", "identity"])
def test_the_other_normalisations(tmp_path: Path, normalisation: str) -> None:
    config = SubwordConfig(kind="bpe", vocab_size=60, normalisation=normalisation)
    train_subwords(sentences(), config, tmp_path / "m")
    subwords = Subwords.load(tmp_path / "m")
    for text in ("die grüne 🦆", "m² ½ ，", "5\u00a0km"):
        assert subwords.decode(subwords.encode(text)) == subwords.normalise(text)
        assert (subwords.normalise(text) == text) == (normalisation == "identity" or "🦆" in text)


@pytest.mark.parametrize("normalisation", ["nfc", "nmt_nfkc", "nfkc", "identity"])
def test_symbols_between_text(tmp_path: Path, normalisation: str) -> None:
    train_subwords(sentences(), SubwordConfig(kind="bpe", vocab_size=60, normalisation=normalisation), tmp_path / "m")
    subwords = Subwords.load(tmp_path / "m")
    first, last = subwords.symbol("slot", 0), subwords.symbol("slot", 15)
    texts: list[list[str | int]] = [
        ["die grüne ", last, ", Wiese ", first, " Ball"],
        ["die", first, "", last, " "],
        ["", last, " die"],
        ["", first, ""],
        ["die grüne"],
    ]
    for parts, ids in zip(texts, subwords.encode_parts(texts), strict=True):
        decoded = subwords.decode_parts(ids)
        assert decoded == [*parts[:-1], str(parts[-1]).rstrip()]
        assert subwords.decode(ids) == "".join(part for part in decoded if isinstance(part, str)).strip()
    assert np.array_equal(subwords.encode_parts([["die grüne 🦆"]])[0], subwords.encode("die grüne 🦆"))
    assert subwords.encode_parts([]) == []
    assert subwords.decode_parts([]) == [""]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(nasty, min_size=1, max_size=5), st.integers(0, 15))
def test_symbols_in_any_text(subwords: Subwords, texts: list[str], number: int) -> None:
    slot = subwords.symbol("slot", number)
    parts = [part for text in texts for part in (text, slot)][:-1]
    ids = subwords.encode_parts([parts])[0].tolist()
    assert ids.count(slot) == len(texts) - 1
    assert not set(ids) & {*subwords.forbidden_ids, EOS} - {slot}
    assert subwords.decode_parts(ids)[1::2] == [slot] * (len(texts) - 1)


def test_slots_are_filled(subwords: Subwords) -> None:
    first, last = subwords.symbol("slot", 0), subwords.symbol("slot", 15)
    [ids] = subwords.encode_parts([["die grüne ", last, " Wiese ", first, first, " Ball"]])
    text, places = subwords.filled(ids, {last: "東 X", first: "ß"})
    assert text == "die grüne 東 X Wiese ßß Ball"
    for number, place, piece in zip(ids, places, subwords.pieces(ids), strict=True):
        shown = {last: "東", first: "ß"}.get(number, piece.replace("▁", ""))
        assert text[place:].startswith(shown)
    assert subwords.filled(ids, {})[0] == "die grüne  Wiese  Ball"
    assert subwords.filled([], {})[0] == ""
    plain = subwords.encode("die grüne Wiese")
    text, places = subwords.filled(plain, {first: "x"})
    assert text == "die grüne Wiese"
    assert np.array_equal(places, subwords.decoded_places(plain))
    assert subwords.decode_batch([plain.tolist(), [], ids[:2].tolist()]) == [text, "", subwords.decode(ids[:2])]


def test_text_cannot_pose_as_a_symbol(subwords: Subwords) -> None:
    slot = subwords.symbol("slot", 0)
    for number in range(0xFDD0, 0xFDF0):  # the place of a symbol is held by one of these
        text = f"die {chr(number)} Wiese"
        assert slot not in subwords.encode_parts([[text]])[0]
        assert np.flatnonzero(subwords.encode_parts([[text, slot]])[0] == slot).tolist() == [len(subwords.encode(text))]


def test_symbol_ids(subwords: Subwords) -> None:
    assert subwords.pieces([subwords.symbol("term", 3), subwords.symbol("tag", 7)]) == ["<term:3>", "<tag:7>"]
    with pytest.raises(IndexError):
        subwords.symbol("slot", 16)
    with pytest.raises(IndexError):
        old_vocabulary().symbol("slot", 0)


def test_decoding_any_ids(subwords: Subwords) -> None:
    ids = np.random.default_rng(0).integers(0, subwords.size, 5000)
    decoded = subwords.decode(ids)
    assert not (CONTROLS - {"\t"}) & set(decoded)
    assert "\ufffd" in decoded
    assert subwords.decode([]) == ""
    assert subwords.decode([BOS, PAD, EOS]) == ""
    assert subwords.decode([UNK]).strip() == "⁇"


def test_controls_spelled_in_bytes_become_blanks(subwords: Subwords) -> None:
    for control in CONTROLS - {"\t"}:
        ids = [FIRST_BYTE + byte for byte in f"x{control}x".encode()]
        assert subwords.decode(ids) == "x x"


def test_controls_in_pieces_become_blanks(tmp_path: Path) -> None:
    controls = "\r\v\f\x1b\x1c\x1d\x1e\x85\u2028\u2029"
    path = tmp_path / "m"
    config = SubwordConfig(kind="bpe", vocab_size=24, normalisation="identity")
    train_subwords([f"Hund{character}Ball" for character in controls] * 20, config, path)
    subwords = Subwords.load(path)
    for character in controls:
        ids = subwords.encode(f"Hund{character}Ball")
        assert ids.min() >= FIRST_LEARNED
        assert subwords.decode(ids) == "Hund Ball"


def test_old_vocabularies_go_on_as_before() -> None:
    old = old_vocabulary()
    assert old.size == 80
    assert old.forbidden_ids == [PAD, UNK, BOS]
    assert all(len(old.reserved_ids(kind)) == 0 for kind in RESERVED)
    assert old.decode(old.encode("die grüne Wiese")) == "die grüne Wiese"
    assert UNK in old.encode("die 東 Wiese")
    assert old.unlearned("die 東 Wiese 🦆") == "東🦆"
    # Full-width letters are known once they are normalised.
    assert old.unlearned("ｄｉｅ Wiese") == ""


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("sentence", ["wort " * 2000 + "ß", "ß▅", "ß\0", "ß" * 5000, "東" * 1500 + "ß"])
def test_no_sentence_is_left_out_of_learning(tmp_path: Path, kind: str, sentence: str) -> None:
    train_subwords([*sentences(), sentence], SubwordConfig(kind=kind, vocab_size=64), tmp_path / "m")
    assert Subwords.load(tmp_path / "m").unlearned("ß") == ""


def test_rare_characters_are_spelled_in_bytes(tmp_path: Path) -> None:
    text = ["die grüne Wiese"] * 1000 + ["Øl 東"]
    train_subwords(text, SubwordConfig(kind="bpe", vocab_size=20, character_coverage=0.999), tmp_path / "m")
    subwords = Subwords.load(tmp_path / "m")
    assert subwords.unlearned("die Øl 東") == "Øl東"
    assert subwords.decode(subwords.encode("die Øl 東")) == "die Øl 東"


def test_characters_are_listed_by_frequency_and_visibly() -> None:
    counts = Counter("ÖÖÖ" + "\u0301\u0301" + "\u200c")
    assert list_characters(counts) == "Ö 3, U+0301 2, U+200C 1"
    assert list_characters(counts, most=1) == "Ö 3 and 2 more"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, kind: str) -> None:
    first = trained(tmp_path, kind).read_bytes()
    assert trained(tmp_path, kind).read_bytes() == first
    other = tmp_path / "other"
    train_subwords(sentences(5), SubwordConfig(kind=kind, vocab_size=64), other)
    assert Subwords.load(other).fingerprint != Subwords(first).fingerprint


def test_unsuitable_sizes_name_the_key_and_the_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus.subwords.vocab_size=9999 is too large .* set it to \d+ or"):
        trained(tmp_path, vocab_size=9999)
    with pytest.raises(ValueError, match=r"corpus.subwords.vocab_size=16 is too small.* need \d+ subwords"):
        trained(tmp_path, vocab_size=16)
    with pytest.raises(ValueError, match="too large") as caught:
        trained(tmp_path, vocab_size=9999)
    largest = int(str(caught.value).split()[-3])
    assert Subwords.load(trained(tmp_path, vocab_size=largest)).size == FIRST_LEARNED + largest
    with pytest.raises(ValueError, match="there is no text to learn"):
        train_subwords([], SubwordConfig(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_broken_models_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = trained(tmp_path)
    no_utf8 = good.read_bytes().replace("ü".encode(), b"\xff\xff")
    no_byte = good.read_bytes().replace(b"<0x41>", b"<ox41>")
    with pytest.raises(ValueError, match=r"nothing\.model cannot be read"):
        Subwords.load(tmp_path / "nothing.model")
    (tmp_path / "endless.model").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"endless\.model cannot be read"):
        Subwords.load(tmp_path / "endless.model")
    for number, data in enumerate((b"", b"junk" * 100, good.read_bytes()[:100], no_utf8, no_byte)):
        path = tmp_path / f"broken{number}"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=path.name) as caught:
            Subwords.load(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
