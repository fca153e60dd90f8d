"""Text to text: a trained model behind one method that answers every line at its place.

A line without a letter or digit that the model knows comes back as it is, one that is too long is translated in parts
(nmt/decoding/segment.py), and nothing a model outputs can break a line in two. Lines are sorted by length for the
search and put back in order.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import EOS, source_batch
from nmt.checkpoint import Checkpoint
from nmt.config import Config, DecodingConfig
from nmt.data.subwords import Subwords, one_line
from nmt.decoding.search import StepOutput, beam_search, length_penalty
from nmt.decoding.segment import join, split
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


class Hypothesis(NamedTuple):
    """What the search found for one source."""

    tokens: list[int]  # without EOS
    score: float  # GNMT eq. 14
    log_prob: float  # log P(Y | X), in nats
    finished: bool  # False: cut off at the greatest length


class Translation(NamedTuple):
    """One translated line."""

    text: str
    score: float
    """GNMT eq. 14; 0 for a line that was not translated. That of parts is log P / lp(|Y|) + cp of all together: the sum
    of their log-probabilities over lp of the sum of their lengths, and the sum of their coverage penalties."""
    num_parts: int = 1
    """More than 1: it was too long to be translated as a whole."""
    finished: bool = True
    """Whether the model ended all of it by itself. Otherwise it was cut off at `decoding.max_length_ratio`."""
    unlearned: str = ""
    """Characters of the source, in order, that the vocabulary learned no piece for: the model has never seen them.
    Empty for what has no letters and digits and comes back as it is."""


class _Part(NamedTuple):
    """A translated line, or part of one."""

    text: str
    hypothesis: Hypothesis | None  # None: there was nothing to translate
    unlearned: str


class Translator:
    """A model, its vocabulary and how to search with it. The model is never changed: several may share it.

    It is used in the precision that `decoding` names: in bf16 as a copy of its own, made once (`in_precision`).
    """

    def __init__(
        self,
        model: Seq2Seq,
        subwords: Subwords,
        decoding: DecodingConfig,
        device: torch.device,
        longest_seen: int = 0,
    ) -> None:
        """Take a trained model; `longest_seen` is `longest_source` of its run, 0 if that is not known."""
        model.check_experts_per_token(decoding.experts_per_token)
        dtype = product_dtype(device, decoding.precision)
        check_widths(model.config, device, dtype, "decoding.precision")
        self.model = in_precision(model, device, dtype)
        self.subwords = subwords
        self.decoding = decoding
        self.device = device
        self._forbidden_F = torch.tensor(subwords.forbidden_ids, dtype=torch.int64, device=device)
        self.longest_seen = longest_seen
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
        longest = longest_source(run.corpus_info(), config)
        translator = cls(loaded.model, loaded.subwords, config.decoding, device, longest)
        translator.steps = loaded.steps
        return translator

    @property
    def max_pieces(self) -> int:
        """Pieces of the longest text that is translated as a whole: no longer than any line it was trained on."""
        limit = self.decoding.max_source_pieces
        return min(limit, self.longest_seen) if self.longest_seen else limit

    def translate(
        self, lines: Sequence[str], long: Collection[int] = (), progress: Callable[[float], None] | None = None
    ) -> list[Translation]:
        """The translation of each line, in order. Any text is a line.

        Lines of more than `max_pieces` pieces are translated in parts, and so are those with their places in `long`:
        pieces of a longer one. `progress` is told now and then what share of the work is done. CheckpointError if the
        model's outputs are not finite.
        """
        parts = [
            [line] if fits and place not in long else split(line, self._fit)
            for place, (line, fits) in enumerate(zip(lines, self._fit(lines), strict=True))
        ]
        translated = iter(self._parts([text for each in parts for text in each], progress))
        results = []
        for place, each in enumerate(parts):
            found = list(islice(translated, len(each)))
            hypotheses = [part.hypothesis for part in found if part.hypothesis]
            alone = len(each) == 1 and place not in long
            results.append(
                Translation(
                    # Blanks around a part belong to the seam.
                    found[0].text if alone else join(each, [part.text.strip() for part in found]),
                    self._score(hypotheses),
                    len(each),
                    all(hypothesis.finished for hypothesis in hypotheses),
                    "".join(part.unlearned for part in found),
                )
            )
        return results

    def _parts(self, texts: list[str], progress: Callable[[float], None] | None) -> list[_Part]:
        """The translations of texts that fit."""
        unlearned = [self.subwords.unlearned(text) if has_words(text) else "" for text in texts]
        wordy = [place for place, text in enumerate(texts) if has_words(text, unlearned[place])]
        encoded = self.subwords.encode_batch([texts[place] for place in wordy])
        sources = {place: pieces for place, pieces in zip(wordy, encoded, strict=True) if len(pieces)}
        found = dict(zip(sources, self.search(list(sources.values()), progress), strict=True))
        parts = []
        for place, (text, unknown) in enumerate(zip(texts, unlearned, strict=True)):
            hypothesis = found.get(place)
            translation = self.subwords.decode(hypothesis.tokens) if hypothesis else one_line(text)
            parts.append(_Part(translation, hypothesis, unknown))
        return parts

    def _fit(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are short enough to be translated as a whole."""
        return [len(pieces) <= self.max_pieces for pieces in self.subwords.encode_batch(texts)]

    def _score(self, found: list[Hypothesis]) -> float:
        """GNMT eq. 14 of several translations taken as one."""
        if len(found) <= 1:
            return found[0].score if found else 0.0
        alpha = self.decoding.alpha
        lengths = [len(each.tokens) + each.finished for each in found]
        coverage = sum(
            each.score - each.log_prob / length_penalty(length, alpha)
            for each, length in zip(found, lengths, strict=True)
        )
        return sum(each.log_prob for each in found) / length_penalty(sum(lengths), alpha) + coverage

    @torch.no_grad()
    def search(
        self, sources: Sequence[np.ndarray], progress: Callable[[float], None] | None = None
    ) -> list[Hypothesis]:
        """What is found for sources given as pieces (at least one each), in their order; `progress` as in `translate`.

        CheckpointError if the model's outputs are not finite.
        """
        results: list[Hypothesis | None] = [None] * len(sources)
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        size = self.decoding.batch_sentences
        todo = sum(map(len, sources))
        done = 0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, result in zip(chosen, self._search_batch([sources[i] for i in chosen]), strict=True):
                results[index] = result
            done += sum(len(sources[index]) for index in chosen)
            if progress:
                progress(done / todo)
        return [result for result in results if result is not None]

    def _search_batch(self, sources: list[np.ndarray]) -> list[Hypothesis]:
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
        if not all(map(math.isfinite, found.scores)):
            raise CheckpointError(
                "the model's outputs are not finite (NaN or infinite): its parameters are damaged, choose another "
                "decoding.checkpoint or model"
            )
        return [Hypothesis(*each) for each in zip(*found, strict=True)]

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


def longest_source(corpus: Mapping[str, Any], config: Config) -> int:
    """Pieces of the longest source line of the training text, by the facts that a run or a preparation has; 0: unknown.

    Where it is older than this fact, the filter of long lines stands in. CheckpointError if it is no number of pieces.
    """
    longest = corpus.get("longest_source_pieces", config.corpus.filters.max_pieces)
    if not isinstance(longest, int) or longest < 0:
        raise CheckpointError(f"longest_source_pieces={longest!r} of corpus.json is no number of pieces: it is damaged")
    return longest


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
    while True:
        try:
            return Loaded(read_model(chosen, config.model, subwords.size, subwords.fingerprint), subwords, chosen)
        except CheckpointError:
            # Where the run is being trained, newer checkpoints may have taken the place of those listed above.
            listed, chosen = chosen, run.chosen(config.decoding)
            if chosen == listed:
                raise


def load_vocabulary(run: RunDirectory) -> Subwords:
    """The vocabulary of a run. CheckpointError if it is missing or damaged."""
    try:
        return Subwords.load(run.subwords_path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
