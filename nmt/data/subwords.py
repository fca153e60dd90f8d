"""SentencePiece: one vocabulary of subword pieces for both languages. No other file knows that library."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from nmt.batch import BOS, EOS, PAD, UNK
from nmt.config import SubwordConfig
from nmt.errors import DataError

UNKNOWN_SURFACE = "⁇"
_QUIET = 2  # SentencePiece's log level: errors alone
# Unigram's sums depend on how the work is divided: a fixed number of threads gives the same everywhere.
_TRAINING_THREADS = 8
_ENCODING_THREADS = min(os.cpu_count() or 1, 16)
_LINE_BREAKS = {ord(character): " " for character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}

sentencepiece.set_min_log_level(_QUIET)


def train_subwords(sentences: Iterable[str], config: SubwordConfig, model_path: Path) -> None:
    """Learn a vocabulary from `sentences`, both languages mixed, and write it to `model_path`.

    The same sentences in the same order give the same bytes. All are used: the caller draws the sample.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalisation,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            unk_surface=UNKNOWN_SURFACE,
            # Byte pieces would let the decoder write a line break.
            byte_fallback=False,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=_TRAINING_THREADS,
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise _training_error(config, str(error)) from error
    model_path.write_bytes(model.getvalue())


def _training_error(config: SubwordConfig, message: str) -> DataError:
    """SentencePiece's complaint as one line in our terms."""
    key = f"corpus.subwords.vocab_size={config.vocab_size}"
    if largest := re.search(r"value <= (\d+)", message):
        return DataError(f"{key} is too large for this text: it yields at most {largest[1]} pieces")
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{key} is too small: the characters of this text alone need {smallest[1]} pieces; raise it, or "
            f"lower corpus.subwords.character_coverage={config.character_coverage}"
        )
    if "sentences_.empty()" in message:
        return DataError(f"{key}: no text to learn pieces from (lines above 4192 bytes are left out)")
    return DataError(f"{key}: SentencePiece cannot learn a vocabulary: {message.splitlines()[0]}")


class Subwords:
    """Text to pieces and back. No method adds or keeps BOS, EOS or PAD."""

    def __init__(self, model: bytes, name: str = "vocabulary") -> None:
        """Take the bytes of a trained model; `name` is for the error message if they are none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            # Empty bytes load without complaint.
            special = [self._processor.piece_to_id(piece) for piece in ("<pad>", "<unk>", "<s>", "</s>")]
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name} is damaged or no SentencePiece model: prepare the corpus again") from error
        if special != [PAD, UNK, BOS, EOS] or self.size <= EOS:
            raise DataError(f"{name} is no vocabulary of this program: prepare the corpus again")
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Subwords":
        """The vocabulary in a file that `train_subwords` wrote."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"vocabulary {path} cannot be read ({error.strerror}): prepare the corpus") from error
        return cls(model, f"vocabulary {path}")

    @property
    def size(self) -> int:
        """Pieces in the vocabulary, the special ones included."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> np.ndarray:
        """The pieces of one text (int32). What looks like a special token is text like any other."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The pieces of many texts, worked out on several threads."""
        # A lone surrogate cannot be UTF-8, and so cannot reach SentencePiece.
        clean = [text if text.isascii() else text.encode(errors="replace").decode() for text in texts]
        ids = self._processor.encode(clean, out_type=int, num_threads=_ENCODING_THREADS)
        return [np.array(sequence, dtype=np.int32) for sequence in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of pieces, always one line. UNK shows as ⁇; the other special ids are skipped."""
        kept = [int(piece) for piece in ids if piece not in (PAD, BOS, EOS)]
        return self._processor.decode(kept).translate(_LINE_BREAKS)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as SentencePiece writes them, "▁" for a blank."""
        return [self._processor.id_to_piece(int(piece)) for piece in ids]
