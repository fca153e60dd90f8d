"""SentencePiece: one vocabulary of subword pieces for both languages. No other file knows that library.

The ids of a new vocabulary: special symbols 0 to 3 (nmt/batch.py), reserved symbols 4 to 71, the 256 bytes 72 to 327,
and then the pieces learned from the text. A character without a piece of its own is spelled in bytes (UTF-8), so that
any text can be written. Vocabularies made by older versions have neither reserved symbols nor bytes.
"""

import hashlib
import io
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nmt.batch import BOS, EOS, NUM_SPECIAL, PAD, UNK
from nmt.config import NUM_ADDED_PIECES, SubwordConfig
from nmt.errors import DataError
from nmt.files import read_regular
from nmt.text.normalisation import CONTROLS, name_nfc, write_nfc_rules

RESERVED = {"language": 32, "slot": 16, "term": 4, "tag": 8, "spare": 8}
"""How many symbols are kept free for each later use: target languages, placeholders, marks around terms, domains and
origins of a text, and what nobody has thought of yet. Typed text never yields one."""
NUM_BYTES = 256
assert NUM_SPECIAL + sum(RESERVED.values()) + NUM_BYTES == NUM_ADDED_PIECES

UNKNOWN_SURFACE = "⁇"
_MOST_BYTES = 1 << 28  # of a vocabulary file
_QUIET = 2  # SentencePiece's log level: errors alone
# Unigram's sums depend on how the work is divided: a fixed number of threads gives the same everywhere.
_TRAINING_THREADS = 8
_ENCODING_THREADS = min(os.cpu_count() or 1, 16)
_STRETCH = 1000  # characters of a sentence learned from at a time
# SentencePiece leaves out longer sentences, silently. A character has at most 4 bytes of UTF-8, a digit 6 more.
_MAX_SENTENCE_BYTES = 10 * _STRETCH
# SentencePiece leaves out sentences with this character too: its own sign for what is unknown.
_UNKNOWN_SIGN = "▅"
# No piece goes across this character (of private use), which is not learned itself. SentencePiece splits the digits
# of ASCII on its own.
_BOUNDARY = "\uf8ff"
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
# SentencePiece writes a blank as "▁".
_BLANK_PIECE = "▁"
# A tab breaks no line.
_TO_BLANK = dict.fromkeys(map(ord, CONTROLS - {"\t"}), " ")
# Bytes of UTF-8 that stand for a control character, and bytes that UTF-8 never has.
_FORBIDDEN_BYTES = frozenset((*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF5, 0x100)))

sentencepiece.set_min_log_level(_QUIET)


def train_subwords(sentences: Iterable[str], config: SubwordConfig, model_path: Path) -> None:
    """Learn a vocabulary from `sentences`, both languages mixed, and write it to `model_path`.

    The same sentences in the same order give the same bytes. All are used: the caller draws the sample.
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
    """`sentences` in stretches that SentencePiece does not leave out, cut at blanks where there are any."""
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
    """SentencePiece's complaint as one line in our terms."""
    key = f"corpus.subwords.vocab_size={config.vocab_size}"
    if found := re.search(r"value <= (\d+)", message):
        largest = int(found[1]) - NUM_ADDED_PIECES
        return DataError(
            f"{key} is too large for this text, which yields {largest} pieces: set it to {largest} or less"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{key} is too small: the characters of this text alone need {int(found[1]) - NUM_ADDED_PIECES} pieces; "
            f"raise it, or lower corpus.subwords.character_coverage={config.character_coverage}"
        )
    if "sentences_.empty()" in message:
        return DataError(f"{key}: no text to learn pieces from")
    return DataError(f"{key}: SentencePiece cannot learn a vocabulary: {message.splitlines()[0]}")


class Subwords:
    """Text to pieces and back. No method adds or keeps BOS, EOS or PAD."""

    def __init__(self, model: bytes, name: str = "vocabulary") -> None:
        """Take the bytes of a trained model; `name` is for the error message if they are none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            # Empty bytes load without complaint.
            special = [self._processor.piece_to_id(piece) for piece in ("<pad>", "<unk>", "<s>", "</s>")]
            pieces = self.pieces(range(self.size))
            forbidden_ids = [number for number, piece in enumerate(pieces) if self._is_forbidden(number, piece)]
        # ValueError: a piece that is no UTF-8, or no byte though it is called one.
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{name} is damaged or no SentencePiece model: prepare the corpus again") from error
        if special != [PAD, UNK, BOS, EOS] or self.size <= EOS:
            raise DataError(f"{name} is no vocabulary of this program: prepare the corpus again")
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.forbidden_ids = forbidden_ids
        """Ids that may never be output: PAD, UNK, BOS, the reserved symbols, and bytes of control characters."""
        learned = "".join(re.escape(piece) for piece in pieces if len(piece) == 1 and piece != _BLANK_PIECE)
        self._unlearned = re.compile(f"[^ {learned}]")

    @classmethod
    def load(cls, path: Path) -> "Subwords":
        """The vocabulary in a file that `train_subwords` wrote."""
        try:
            model = read_regular(path, _MOST_BYTES)
        except OSError as error:
            problem = error.strerror or error
            raise DataError(f"vocabulary {path} cannot be read ({problem}): prepare the corpus") from error
        return cls(model, f"vocabulary {path}")

    @property
    def size(self) -> int:
        """Pieces in the vocabulary, the special, reserved and byte pieces included."""
        return self._processor.get_piece_size()

    def reserved_ids(self, kind: str) -> range:
        """The ids of a kind of `RESERVED`; none in a vocabulary that an older version made."""
        first = self._processor.piece_to_id(f"<{kind}:0>")
        return range(first, first + RESERVED[kind]) if self._processor.is_control(first) else range(0)

    def encode(self, text: str) -> np.ndarray:
        """The pieces of one text (int32). What looks like a special or reserved symbol is text like any other."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The pieces of many texts, worked out on several threads."""
        ids = self._processor.encode([_writable(text) for text in texts], out_type=int, num_threads=_ENCODING_THREADS)
        return [np.array(sequence, dtype=np.int32) for sequence in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of pieces, always one line. UNK shows as ⁇, bytes that are no UTF-8 as U+FFFD.

        The other special ids are skipped. Control characters but the tab become blanks.
        """
        kept = [int(piece) for piece in ids if piece not in (PAD, BOS, EOS)]
        return one_line(self._processor.decode(kept))

    def normalise(self, text: str) -> str:
        """`text` as the vocabulary's rules of normalisation rewrite it: what decoding its pieces gives back."""
        return self._processor.normalize(_writable(text)).replace(_BLANK_PIECE, " ").removeprefix(" ")

    def unlearned(self, text: str) -> str:
        """The characters of `text`, in order, that have no piece of their own: in bytes, or unknown.

        They are taken after normalisation, which may have made known ones of them.
        """
        if not self._unlearned.search(text):
            return ""
        return "".join(self._unlearned.findall(self.normalise(text)))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as SentencePiece writes them, "▁" for a blank."""
        return self._processor.id_to_piece([int(piece) for piece in ids])

    def _is_forbidden(self, number: int, piece: str) -> bool:
        if self._processor.is_byte(number):
            return int(piece[1:-1], 16) in _FORBIDDEN_BYTES
        special = self._processor.is_control(number) or self._processor.is_unknown(number)
        return special and number != EOS


def one_line(text: str) -> str:
    """`text` with blanks for its control characters and line breaks, tabs excepted."""
    return text.translate(_TO_BLANK)


def list_characters(counts: Counter[str], most: int = 20) -> str:
    """The most frequent characters with their counts, such as "Ö 38, U+0301 2 and 5 more"."""
    shown = ", ".join(f"{_visible(character)} {count:,}" for character, count in counts.most_common(most))
    return shown + (f" and {len(counts) - most:,} more" if len(counts) > most else "")


def _visible(character: str) -> str:
    """The character itself, or its code point where it would not show or would sit on its neighbour."""
    alone = character.isprintable() and not unicodedata.category(character).startswith("M")
    return character if alone else f"U+{ord(character):04X}"


def _writable(text: str) -> str:
    """`text` as SentencePiece can take it."""
    text = text.replace("\0", " ")
    if text.isascii():
        return text
    # A lone surrogate cannot be UTF-8. A "▁" that was typed would become a blank.
    return text.encode(errors="replace").decode().replace(_BLANK_PIECE, "_")
