"""Learn and apply one vocabulary of subwords for both languages. Only this file imports SentencePiece.

The ids of a new vocabulary: special symbols 0 to 3 (nmt/tokens.py), reserved symbols 4 to 71, the 256 bytes 72 to 327,
then the subwords learned from the text. A character that is in no subword is encoded as its UTF-8 bytes, so that any
text can be encoded. Vocabularies of older versions have neither reserved symbols nor bytes.
"""

import hashlib
import io
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nmt.config import NUM_ADDED_PIECES, SubwordConfig
from nmt.errors import DataError
from nmt.files import read_regular
from nmt.text.normalisation import CONTROLS, name_nfc, write_nfc_rules
from nmt.tokens import BOS, EOS, NUM_SPECIAL, PAD, UNK

RESERVED = {"language": 32, "slot": 16, "term": 4, "tag": 8, "spare": 8}
"""Number of symbols reserved per future use: target languages, placeholders, marks around terms, domains and origins
of texts, and uses not yet known. Encoding text never yields one."""
NUM_BYTES = 256
assert NUM_SPECIAL + sum(RESERVED.values()) + NUM_BYTES == NUM_ADDED_PIECES

UNKNOWN_SURFACE = "⁇"
BLANK_SIGN, START_SIGN, END_SIGN = "␣", "⟨start⟩", "⟨end⟩"
"""What a reader sees for a blank, and for the start and the end of a sentence."""
_MOST_BYTES = 1 << 28  # of a vocabulary file
_QUIET = 2  # SentencePiece's log level: errors only
# The unigram model's sums depend on the number of threads. A fixed number gives the same vocabulary on any machine.
_TRAINING_THREADS = 8
_THREADS = min(os.cpu_count() or 1, 16)
_STRETCH = 1000  # characters per stretch of text in training
# SentencePiece silently skips longer sentences. A character has at most 4 bytes of UTF-8; boundaries add 6 per digit.
_MAX_SENTENCE_BYTES = 10 * _STRETCH
# SentencePiece also skips sentences with this character, its own sign for unknown text.
_UNKNOWN_SIGN = "▅"
# No subword crosses this private-use character, which is not learned itself. SentencePiece splits ASCII digits without
# it.
_BOUNDARY = "\uf8ff"
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
# SentencePiece writes a blank as "▁".
_BLANK_PIECE = "▁"
_BLANKS = re.compile(r"\s+")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# A tab does not break a line.
_TO_BLANK = dict.fromkeys(map(ord, CONTROLS - {"\t"}), " ")
# Characters that Unicode reserves for use inside programs. One without a subword holds the place of a symbol.
_PLACE_HOLDERS = range(0xFDD0, 0xFDF0)
# Bytes that encode a control character, and bytes that never occur in UTF-8.
_FORBIDDEN_BYTES = frozenset((*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF5, 0x100)))

sentencepiece.set_min_log_level(_QUIET)


def train_subwords(sentences: Iterable[str], config: SubwordConfig, model_path: Path) -> None:
    """Learn a vocabulary from `sentences`, both languages mixed, and write it to `model_path`.

    The same sentences in the same order give the same file. All sentences are used: the caller draws the sample.
    DataError if `config` does not fit the text.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules: dict[str, Any] = {"normalization_rule_name": config.normalisation}
        if config.normalisation == "nfc":
            rules = {"normalization_rule_tsv": str(Path(folder, "nfc.tsv"))}
            write_nfc_rules(Path(folder, "nfc.tsv"))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_learnable(sentences),
                model_writer=model,
                model_type=config.kind,
                vocab_size=config.num_pieces,
                character_coverage=config.character_coverage,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                unk_surface=UNKNOWN_SURFACE,
                control_symbols=[f"<{kind}:{n}>" for kind, count in RESERVED.items() for n in range(count)],
                byte_fallback=True,
                split_digits=True,
                pretokenization_delimiter=_BOUNDARY,
                max_sentence_length=_MAX_SENTENCE_BYTES,
                input_sentence_size=0,
                shuffle_input_sentence=False,
                num_threads=_TRAINING_THREADS,
                minloglevel=_QUIET,
                **rules,
            )
        except RuntimeError as error:
            raise _training_error(config, str(error)) from error
    learned = model.getvalue()
    model_path.write_bytes(name_nfc(learned) if config.normalisation == "nfc" else learned)


def _learnable(sentences: Iterable[str]) -> Iterator[str]:
    """Yield `sentences` in stretches short enough for SentencePiece, cut at blanks where possible."""
    for sentence in sentences:
        rest = _writable(sentence).replace(_UNKNOWN_SIGN, " ").replace(_BOUNDARY, " ")
        while len(rest) > _STRETCH:
            cut = rest.rfind(" ", 1, _STRETCH)
            if cut < 0:
                cut = _STRETCH
            yield _OTHER_DIGIT.sub(rf"{_BOUNDARY}\g<0>{_BOUNDARY}", rest[:cut])
            rest = rest[cut:]
        yield _OTHER_DIGIT.sub(rf"{_BOUNDARY}\g<0>{_BOUNDARY}", rest)


def _training_error(config: SubwordConfig, message: str) -> DataError:
    """Return SentencePiece's error as one line that names the settings to change."""
    key = f"corpus.subwords.vocab_size={config.vocab_size}"
    if found := re.search(r"value <= (\d+)", message):
        largest = int(found[1]) - NUM_ADDED_PIECES
        return DataError(
            f"{key} is too large for this text, which yields {largest} subwords: set it to {largest} or less"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{key} is too small: the characters of this text alone need {int(found[1]) - NUM_ADDED_PIECES} subwords; "
            f"raise it, or lower corpus.subwords.character_coverage={config.character_coverage}"
        )
    if "sentences_.empty()" in message:
        return DataError(f"{key}: there is no text to learn subwords from")
    return DataError(f"{key}: SentencePiece cannot learn a vocabulary: {message.splitlines()[0]}")


class Subwords:
    """Encoder and decoder between text and subword ids. No method adds or keeps BOS, EOS or PAD."""

    def __init__(self, model: bytes, name: str = "vocabulary") -> None:
        """Load a trained model from its bytes. DataError, which calls it `name`, if they are not a vocabulary."""
        try:
            if not model:  # SentencePiece loads it without an error
                raise ValueError
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            special = [self._processor.piece_to_id(piece) for piece in ("<pad>", "<unk>", "<s>", "</s>")]
            pieces = self._processor.id_to_piece([*range(self.size)])
            forbidden_ids = [number for number, piece in enumerate(pieces) if self._is_forbidden(number, piece)]
        # ValueError: a piece is not valid UTF-8, or is marked as a byte but does not name one.
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{name} is damaged or not a SentencePiece model: prepare the corpus again") from error
        if special != [PAD, UNK, BOS, EOS] or self.size <= EOS:
            raise DataError(f"{name} is not a vocabulary of this program: prepare the corpus again")
        self._pieces: list[str] = pieces
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.forbidden_ids = forbidden_ids
        """Ids that must never be output: PAD, UNK, BOS, the reserved symbols, and bytes of control characters."""
        self._learned = frozenset(piece for piece in pieces if len(piece) == 1 and piece != _BLANK_PIECE) | {" "}
        self._holder = next(chr(number) for number in _PLACE_HOLDERS if chr(number) not in self._learned)
        self._slots = frozenset(self.reserved_ids("slot"))

    @classmethod
    def load(cls, path: Path) -> "Subwords":
        """Load the vocabulary from a file that `train_subwords` wrote. DataError if it cannot be read or is damaged."""
        try:
            model = read_regular(path, _MOST_BYTES)
        except OSError as error:
            problem = error.strerror or error
            raise DataError(f"vocabulary {path} cannot be read ({problem}): prepare the corpus") from error
        return cls(model, f"vocabulary {path}")

    @property
    def size(self) -> int:
        """Number of ids of the vocabulary, including special symbols, reserved symbols and bytes."""
        return self._processor.get_piece_size()

    def reserved_ids(self, kind: str) -> range:
        """Return the ids reserved for `kind` of `RESERVED`; an empty range for a vocabulary of an older version."""
        first = self._processor.piece_to_id(f"<{kind}:0>")
        return range(first, first + RESERVED[kind]) if self._processor.is_control(first) else range(0)

    def symbol(self, kind: str, number: int) -> int:
        """Return the id of symbol `number` of `kind` of `RESERVED`. IndexError if the vocabulary does not have it."""
        return self.reserved_ids(kind)[number]

    def encode(self, text: str) -> np.ndarray:
        """Return the subword ids of one text (int32). Text that looks like a special symbol is encoded as text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = _THREADS) -> list[np.ndarray]:
        """Return the subword ids of many texts, encoded on several threads."""
        ids = self._processor.encode([_writable(text) for text in texts], out_type=int, num_threads=threads)
        return [np.array(sequence, dtype=np.int32) for sequence in ids]

    def encode_within(self, text: str) -> list[int]:
        """Return the ids of a text as it is encoded inside a line: no blank is added, and its own are kept."""
        # SentencePiece adds a blank before a line, and removes those at its ends. No subword has the place holder.
        found = self._processor.encode(f"{self._holder}{_writable(text)}{self._holder}", return_type="offset_mapping")
        places = zip(found["ids"], (begin for begin, _ in found["offsets"]), strict=True)
        return [piece for piece, begin in places if 0 < begin <= len(text)]

    def texts(self) -> list[str | None]:
        """Return the text of each id, with its blanks. Special and reserved symbols and bytes have None."""
        plain = (
            not (self._processor.is_control(each) or self._processor.is_unknown(each) or self._processor.is_byte(each))
            for each in range(self.size)
        )
        pieces = zip(self._pieces, plain, strict=True)
        return [piece.replace(_BLANK_PIECE, " ") if is_text else None for piece, is_text in pieces]

    def encode_parts(self, texts: Sequence[Sequence[str | int]]) -> list[np.ndarray]:
        """Return the subword ids of many texts, each in parts: text, and the ids of reserved symbols between.

        The text is encoded as if it had no symbols, except that no subword crosses one. It keeps its blanks, so
        ["to ", slot, "."] has a blank before the slot and none after it. A vocabulary without symbols cannot have them.
        """
        # SentencePiece would begin each part with a blank, so a text is encoded whole, with characters for its symbols.
        symbols = [[part for part in parts if isinstance(part, int)] for parts in texts]
        whole = [
            self._held(parts) if each else "".join(map(str, parts)) for parts, each in zip(texts, symbols, strict=True)
        ]
        encoded = zip(self.encode_batch(whole), symbols, strict=True)
        return [self._with_symbols(ids, each) if each else ids for ids, each in encoded]

    def _held(self, parts: Sequence[str | int]) -> str:
        """Return the text of `parts` with a place holder for each symbol, and no other place holder."""
        return "".join(
            self._holder if isinstance(part, int) else part.replace(self._holder, "\ufffd") for part in parts
        )

    def _with_symbols(self, ids: np.ndarray, symbols: list[int]) -> np.ndarray:
        """Return `ids` with one of `symbols`, in order, in place of the bytes of each place holder."""
        first, more = self._held_at(ids)
        assert len(first) == len(symbols)
        ids = ids.copy()
        ids[first] = symbols
        return np.delete(ids, more)

    def _held_at(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in `ids` the first bytes of place holders are, and where their other bytes are."""
        size = len(self._holder.encode())
        holder = self._processor.encode(self._holder, out_type=int)[-size:]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(ids, (0, size)), size)
        first = np.flatnonzero((windows == holder).all(1))
        return first, (first[:, None] + np.arange(1, size)).ravel()

    def decode_parts(self, ids: Sequence[int]) -> list[str | int]:
        """Return the text of subword ids like `decode`, in an odd number of parts: text, id of a slot, text, and so on.

        A text may be empty. Blanks on both sides of a slot are kept.
        """
        parts: list[str | int] = []
        text: list[int] = []
        for piece in map(int, ids):
            if piece in self._slots:
                parts += [self._decode_part(text, bool(parts)), piece]
                text = []
            else:
                text.append(piece)
        return [*parts, self._decode_part(text, bool(parts))]

    def _decode_part(self, ids: list[int], inside: bool) -> str:
        """Return the text of some ids; its first blank is kept if they are `inside` a text."""
        if not inside:
            return self.decode(ids)
        guard = self._processor.piece_to_id("<0x41>")
        return self.decode([guard, *ids])[1:]

    def filled(self, ids: Sequence[int], fills: Mapping[int, str]) -> tuple[str, np.ndarray]:
        """Return the text of ids with `fills` in place of slots, and where each id begins in it, like `decoded_places`.

        A slot that is not in `fills` leaves nothing.
        """
        text = ""
        places: list[np.ndarray] = []
        start = 0
        for end in [*(place for place, piece in enumerate(ids) if int(piece) in self._slots), len(ids)]:
            # SentencePiece would leave out the first blank of a text.
            guard = [self._processor.piece_to_id("<0x41>")] * bool(start)
            pieces = [*guard, *map(int, ids[start:end])]
            found = self._processor.decode(pieces, return_type="offset_mapping")
            begins = _after_blanks(found["text"], [begin for begin, _ in found["offsets"]][len(guard) :])
            places.append(begins - len(guard) + len(text))
            text += one_line(found["text"][len(guard) :])
            if end < len(ids):
                places.append(np.full(1, len(text)))
                text += fills.get(int(ids[end]), "")
            start = end + 1
        return text, np.concatenate(places)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of subword ids, always a single line. UNK becomes ⁇; invalid UTF-8 becomes U+FFFD.

        Other special ids are skipped. Control characters except the tab become blanks.
        """
        return self.decode_batch([[int(piece) for piece in ids if piece not in (PAD, BOS, EOS)]])[0]

    def decode_batch(self, ids: Sequence[list[int]]) -> list[str]:
        """Return the texts of many sequences like `decode`, on several threads. None of `ids` is PAD, BOS or EOS."""
        texts = self._processor.decode(list(ids), num_threads=_THREADS) if ids else []
        return [one_line(text) for text in texts]

    def places(self, text: str) -> np.ndarray:
        """Return where in `text` each subword of `encode(text)` begins, blanks before it excepted (int64)."""
        found = self._processor.encode(_writable(text), return_type="offset_mapping")["offsets"]
        return _after_blanks(text, [begin for begin, _ in found])

    def part_places(self, parts: Sequence[str | int]) -> np.ndarray:
        """Return where in the text of `parts`, joined, each subword of `encode_parts` begins; -1 for a symbol."""
        held = self._held(parts)
        found = self._processor.encode(_writable(held), return_type="offset_mapping")
        places = _after_blanks(held, [begin for begin, _ in found["offsets"]])
        first, more = self._held_at(np.array(found["ids"], dtype=np.int32))
        holders = np.flatnonzero([character == self._holder for character in held])
        places -= np.searchsorted(holders, places)
        places[first] = -1
        return np.delete(places, more)

    def decoded_places(self, ids: Sequence[int]) -> np.ndarray:
        """Return where in `decode(ids)` each subword begins, like `places`. None of `ids` is PAD, BOS or EOS."""
        found = self._processor.decode([int(piece) for piece in ids], return_type="offset_mapping")
        return _after_blanks(found["text"], [begin for begin, _ in found["offsets"]])

    def normalise(self, text: str) -> str:
        """Return `text` normalised by the vocabulary's rules, which is what encoding and decoding it returns."""
        return self._processor.normalize(_writable(text)).replace(_BLANK_PIECE, " ").removeprefix(" ")

    def unlearned(self, text: str) -> str:
        """Return the characters of `text` that are not in the vocabulary, in order: those in bytes or unknown.

        `text` is normalised first, which can replace unknown characters with known ones.
        """
        if self._learned.issuperset(text):
            return ""
        return "".join(character for character in self.normalise(text) if character not in self._learned)

    def learned(self) -> tuple[dict[str, int], np.ndarray]:
        """Return the ids of the pieces learned from text, as SentencePiece writes them, and the scores of all pieces.

        A score is a log probability, or the place of a merge in its order, negative (`is_bpe`).
        """
        is_other = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        ids = {piece: n for n, piece in enumerate(self._pieces) if not any(each(n) for each in is_other)}
        return ids, np.array([self._processor.get_score(n) for n in range(self.size)], dtype=np.float64)

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are made by merges (byte-pair encoding) rather than chosen by probability (unigram)."""
        ids, scores = self.learned()
        found = scores[list(ids.values())]
        return bool((found == np.round(found)).all())  # -0, -1, -2, ...; log probabilities are no whole numbers

    @cached_property
    def cuts_words_apart(self) -> bool:
        """Whether the ids of a text are those of its words, which blanks separate, one after the other.

        So it is with vocabularies of kind bpe that this program learns.
        """
        across = any(_BLANK_PIECE in piece[1:] for piece in self.learned()[0])
        return self.is_bpe and not across and self._processor.normalize(" a  b ") == f"{_BLANK_PIECE}a{_BLANK_PIECE}b"

    def byte_ids(self) -> list[int]:
        """Return the ids of bytes and of unknown text."""
        return [each for each in range(self.size) if self._processor.is_byte(each) or self._processor.is_unknown(each)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of these ids as SentencePiece writes them, with "▁" for a blank."""
        return list(map(self._pieces.__getitem__, ids))

    def _is_forbidden(self, number: int, piece: str) -> bool:
        if self._processor.is_byte(number):
            return int(piece[1:-1], 16) in _FORBIDDEN_BYTES
        special = self._processor.is_control(number) or self._processor.is_unknown(number)
        return special and number != EOS


def readable(piece: str) -> str:
    """Return a piece for a reader: "␣the" for "▁the", and "⟨end⟩" for "</s>"."""
    return END_SIGN if piece == "</s>" else piece.replace(_BLANK_PIECE, BLANK_SIGN)


def _after_blanks(text: str, places: list[int]) -> np.ndarray:
    """Return these places in a text, each moved to the next character that is not a blank."""
    skipped = [match.end() - place if (match := _BLANKS.match(text, place)) else 0 for place in places]
    return np.array(places, dtype=np.int64) + np.array(skipped, dtype=np.int64)


def split_words(pieces: Sequence[str]) -> list[tuple[str, int]]:
    """Return (word, number of its pieces) of each word of a text: what blanks separate. The end, "</s>", is a word."""
    words: list[list[str]] = []
    for piece in pieces:
        if piece.startswith(_BLANK_PIECE) or piece == "</s>" or not words:
            words.append([])
        words[-1].append(piece)
    return [(_spelled(each), len(each)) for each in words]


def _spelled(pieces: Sequence[str]) -> str:
    """Return the characters of a word; a character outside the vocabulary is in several pieces, its bytes."""
    found = b"".join(
        bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(piece)) else piece.encode() for piece in pieces
    )
    return found.decode(errors="replace").removeprefix(_BLANK_PIECE)


def one_line(text: str) -> str:
    """Return `text` with its control characters and line breaks, but not tabs, replaced by blanks."""
    # Most texts have none of them, which is faster to see.
    return text if text.isprintable() else text.translate(_TO_BLANK)


def list_characters(counts: Counter[str], most: int = 20) -> str:
    """Return the `most` most frequent characters with their counts, such as "Ö 38, U+0301 2 and 5 more"."""
    shown = ", ".join(f"{_visible(character)} {count:,}" for character, count in counts.most_common(most))
    return shown + (f" and {len(counts) - most:,} more" if len(counts) > most else "")


def _visible(character: str) -> str:
    """Return the character, or its code point if it is not printable or combines with its neighbour."""
    alone = character.isprintable() and not unicodedata.category(character).startswith("M")
    return character if alone else f"U+{ord(character):04X}"


def _writable(text: str) -> str:
    """Return `text` in a form that SentencePiece accepts."""
    text = text.replace("\0", " ")
    if text.isascii():
        return text
    # A lone surrogate has no UTF-8 encoding. A typed "▁" would become a blank.
    return text.encode(errors="replace").decode().replace(_BLANK_PIECE, "_")
