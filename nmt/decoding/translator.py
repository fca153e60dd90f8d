"""Text to text: a trained model behind one method that answers every line at its place.

A line without a letter or digit that the model knows comes back as it is, one that is too long is translated in parts,
and nothing a model outputs can break a line in two. Lines are sorted by length for the search and put back in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import EOS, source_batch
from nmt.checkpoint import Checkpoint
from nmt.config import Config, DecodingConfig
from nmt.data.subwords import Subwords, one_line
from nmt.decoding.search import StepOutput, beam_search
from nmt.device import pick_device, product_dtype, set_float32_products
from nmt.errors import CheckpointError
from nmt.model.assemble import in_precision
from nmt.model.attention import Memory
from nmt.model.grouped import check_widths
from nmt.model.seq2seq import DecoderState, Seq2Seq
from nmt.parameters import read_model
from nmt.run import RunDirectory

# A translation may be this much longer than max_length_ratio allows: short sentences need the room.
_EXTRA_LENGTH = 10


class _State(NamedTuple):
    """What a search over `Seq2Seq` carries: the memory once per sentence, the decoder once per hypothesis."""

    memory: Memory
    decoder: DecoderState | None

    def select(self, columns_R: Tensor) -> "_State":
        return self._replace(decoder=self.decoder.select(columns_R) if self.decoder else None)

    def shrink(self, sentences_B: Tensor) -> "_State":
        return self._replace(memory=self.memory.select(sentences_B))


class Translation(NamedTuple):
    """One translated line."""

    text: str
    score: float  # GNMT eq. 14; the sum over parts; 0 for a line that was not translated
    unlearned: str = ""
    """Characters of the source, in order, that the vocabulary learned no piece for: the model has never seen them.
    Empty for a line without letters and digits, which comes back as it is."""


class Translator:
    """A model, its vocabulary and how to search with it. The model is never changed: several may share it.

    It is used in the precision that `decoding` names: in bf16 as a copy of its own, made once (`in_precision`).
    """

    def __init__(self, model: Seq2Seq, subwords: Subwords, decoding: DecodingConfig, device: torch.device) -> None:
        model.check_experts_per_token(decoding.experts_per_token)
        dtype = product_dtype(device, decoding.precision)
        check_widths(model.config, device, dtype, "decoding.precision")
        self.model = in_precision(model, device, dtype)
        self.subwords = subwords
        self.decoding = decoding
        self.device = device
        self._forbidden_F = torch.tensor(subwords.forbidden_ids, dtype=torch.int64, device=device)
        self.num_long_lines = 0
        """Lines that were translated in parts so far."""
        self.steps: list[int] = []
        """Steps of training whose parameters, or the mean of them, the model has, if it was loaded."""

    @classmethod
    def load(cls, run: RunDirectory, config: Config) -> "Translator":
        """The translator of a run at the checkpoint that `config.decoding` names, or of an exported model.

        CheckpointError as for `load_model`.
        """
        device = pick_device(config.decoding.device, "decoding.device")
        set_float32_products(device, config.decoding.precision)
        loaded = load_model(run, config)
        translator = cls(loaded.model, loaded.subwords, config.decoding, device)
        translator.steps = loaded.steps
        return translator

    def translate(self, lines: Sequence[str]) -> list[Translation]:
        """The translation of each line, in order. Any text is a line."""
        parts: list[np.ndarray] = []
        owners: list[int] = []
        unlearned = [self.subwords.unlearned(line) if has_words(line) else "" for line in lines]
        wordy = [index for index, line in enumerate(lines) if has_words(line, unlearned[index])]
        encoded = self.subwords.encode_batch([lines[index] for index in wordy])
        for index, pieces in zip(wordy, encoded, strict=True):
            limit = self.decoding.max_source_pieces
            self.num_long_lines += len(pieces) > limit
            for start in range(0, len(pieces), limit):
                parts.append(pieces[start : start + limit])
                owners.append(index)
        texts: list[list[str]] = [[] for _ in lines]
        scores = [0.0] * len(lines)
        for owner, (pieces_out, score) in zip(owners, self.search(parts), strict=True):
            texts[owner].append(self.subwords.decode(pieces_out))
            scores[owner] += score
        for index in set(range(len(lines))).difference(wordy):
            texts[index] = [one_line(lines[index])]
        joined = (" ".join(filter(None, text)) for text in texts)
        return [Translation(*each) for each in zip(joined, scores, unlearned, strict=True)]

    @torch.no_grad()
    def search(self, sources: Sequence[np.ndarray]) -> list[tuple[list[int], float]]:
        """(target pieces, score) of sources given as pieces (at least one each), in their order."""
        results: list[tuple[list[int], float]] = [([], 0.0)] * len(sources)
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        size = self.decoding.batch_sentences
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, result in zip(chosen, self._search_batch([sources[i] for i in chosen]), strict=True):
                results[index] = result
        return results

    def _search_batch(self, sources: list[np.ndarray]) -> list[tuple[list[int], float]]:
        source_SB, length_B, rows_N = (tensor.to(self.device) for tensor in source_batch(sources))
        memory, _ = self.model.encode(source_SB, length_B, rows_N, self.decoding.experts_per_token)
        longest_B = ((length_B - 1) * self.decoding.max_length_ratio).long() + _EXTRA_LENGTH
        found = beam_search(
            self._step,
            _State(memory, None),
            # The end-of-sentence position need not be attended to: only the source's own pieces want covering.
            wanted_BS=(~memory.padding_SB & (source_SB != EOS)).T,
            max_length_B=longest_B,
            forbidden_F=self._forbidden_F,
            beam_size=self.decoding.beam_size,
            alpha=self.decoding.alpha,
            beta=self.decoding.beta,
        )
        return list(zip(found.tokens, found.scores, strict=True))

    def _step(self, previous_KB: Tensor, state: _State) -> StepOutput:
        beam_size, sentences = previous_KB.shape
        decoded = self.model.decode(
            previous_KB.reshape(1, -1), state.memory, state.decoder, experts_per_token=self.decoding.experts_per_token
        )
        logits_RV = self.model.logits(decoded.x_TRD[0])
        return StepOutput(
            logits_RV.view(beam_size, sentences, -1),
            decoded.weights_TRS[0].view(beam_size, sentences, -1),
            state._replace(decoder=decoded.state),
        )


def has_words(text: str, unlearned: str = "") -> bool:
    """Whether there is anything to translate: a letter or a digit of any script, other than those in `unlearned`."""
    return any(character.isalnum() and character not in unlearned for character in text)


class Loaded(NamedTuple):
    """A trained model, on the CPU and in evaluation mode."""

    model: Seq2Seq
    subwords: Subwords
    checkpoints: list[Checkpoint]
    """Those whose parameters, or the mean of them, it has."""

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints."""
        return [step for checkpoint in self.checkpoints for step in checkpoint.steps]


def load_model(run: RunDirectory, config: Config) -> Loaded:
    """The model of a run at the checkpoint that `config.decoding` names, or an exported one: the one way to get it.

    CheckpointError if the run, its checkpoint or its vocabulary is missing, damaged or does not fit.
    """
    subwords = load_vocabulary(run)
    chosen = run.chosen(config.decoding)
    return Loaded(read_model(chosen, config.model, subwords.size, subwords.fingerprint), subwords, chosen)


def load_vocabulary(run: RunDirectory) -> Subwords:
    """The vocabulary of a run. CheckpointError if it is missing or damaged."""
    try:
        return Subwords.load(run.subwords_path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
