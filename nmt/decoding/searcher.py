"""The search with a trained model: from the subwords of sentences to the hypotheses that translate them.

Sentences are sorted by length and searched in batches with a limit on their subwords. So memory is bounded for any
mixture of lengths. Results do not depend on the batches, and are put back in order.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import source_batch
from nmt.decoding.rules import Rules
from nmt.decoding.search import BeamSettings, StepOutput, beam_search
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.device import shortage_told
from nmt.errors import CheckpointError, MemoryLimitError
from nmt.model.attention import Memory
from nmt.model.seq2seq import DecoderState, Seq2Seq

# A translation may have this many more subwords than max_length_ratio allows, for the sake of short sentences.
_EXTRA_LENGTH = 10
# Subwords per batch, by the device, if `decoding.batch_tokens` is 0.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Shorter sentences count as this long, since the scores of the vocabulary take memory for each sentence.
_LEAST_LENGTH = 16

Sources = Sequence[np.ndarray]
"""Subword ids of sentences, at least one each, without EOS."""


class _State(NamedTuple):
    """State of a search with `Seq2Seq`: the memory has a column per sentence, the decoder one per hypothesis."""

    memory: Memory
    decoder: DecoderState

    def take_(self, after: DecoderState, columns_R: Tensor) -> None:
        self.decoder.take_(after, columns_R)

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "_State":
        return _State(self.memory.select(sentences_B), self.decoder.select(columns_R))


class Searcher:
    """A model on its device. Nothing here changes, so several threads may share it."""

    def __init__(self, model: Seq2Seq, device: torch.device, forbidden: Sequence[int]) -> None:
        """Keep a model in the precision of its products (`WorkingWeights`). `forbidden` subwords are never output."""
        self.model, self.device = model, device
        self._forbidden_F = torch.tensor(forbidden, dtype=torch.int64, device=device)

    @torch.no_grad()
    def search(
        self, sources: Sources, options: Options, progress: Callable[[float], None] | None = None
    ) -> list[list[Hypothesis]]:
        """Return the best hypotheses for each source, in order; each list is best first.

        A batch for which memory does not suffice is halved and searched again. `progress` is called after each batch
        with the fraction of the work that is done. CheckpointError if the model's outputs are not finite.
        MemoryLimitError if memory does not suffice for a single sentence. ValueError for options that the model does
        not allow.
        """
        self.model.check_experts_per_token(options.experts_per_token)
        results: list[list[Hypothesis]] = [[] for _ in sources]
        most = options.batch_tokens or _BATCH_TOKENS[self.device.type]
        todo, done = sum(map(len, sources)), 0
        for chosen in batches([len(source) + 1 for source in sources], most):
            for index, found in zip(chosen, self._search_any([sources[i] for i in chosen], options), strict=True):
                results[index] = found
            done += sum(len(sources[index]) for index in chosen)
            if progress:
                progress(done / todo)
        return results

    def _search_any(self, sources: Sources, options: Options) -> list[list[Hypothesis]]:
        """Return the hypotheses of a batch, searched in halves if memory does not suffice for the whole."""
        try:
            with shortage_told(lambda: _described(sources, options), "lower beam_size or max_source_pieces"):
                return self._search_batch(sources, options)
        except MemoryLimitError:
            if len(sources) == 1:
                raise
        # Outside of the handler, which would keep the tensors of the failed search alive.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(sources) + 1) // 2
        return [*self._search_any(sources[:half], options), *self._search_any(sources[half:], options)]

    def _search_batch(self, sources: Sources, options: Options) -> list[list[Hypothesis]]:
        source_N, rows = source_batch(sources)
        source_N, rows = source_N.to(self.device), rows.map(lambda tensor: tensor.to(self.device))
        encoded, _ = self.model.encode(source_N, rows, options.experts_per_token)
        memory = self.model.memory(encoded)
        position_S1 = torch.arange(rows.num_positions, device=self.device)[:, None]
        longest_B = ((rows.length_B - 1) * options.max_length_ratio).long() + _EXTRA_LENGTH
        found = beam_search(
            partial(self._step, options.experts_per_token),
            _State(memory, self.model.start(options.beam_size * len(sources))),
            # The coverage penalty is for the source's subwords only, not for its end-of-sentence position.
            wanted_BS=(position_S1 < rows.length_B - 1).T,
            rules=Rules(torch.ones_like(longest_B), longest_B, self._forbidden_F),
            settings=BeamSettings(
                options.beam_size, options.alpha, options.beta, options.n_best, attention=options.attention
            ),
        )
        # A sentence has no hypothesis if the outputs for it were never finite.
        if not all(hypotheses and math.isfinite(hypotheses[0].score) for hypotheses in found):
            raise CheckpointError(
                "the model's outputs are not finite (NaN or infinite), so its parameters are damaged: choose another "
                "decoding.checkpoint or model"
            )
        if not options.attention:
            return found
        # Remove padding, which depends on the other sentences of the batch.
        return [
            [_without_padding(hypothesis, len(source) + 1) for hypothesis in hypotheses]
            for source, hypotheses in zip(sources, found, strict=True)
        ]

    def _step(self, experts_per_token: int, previous_KB: Tensor, state: _State) -> StepOutput:
        beam_size, sentences = previous_KB.shape
        decoded = self.model.step(previous_KB.reshape(-1), state.memory, state.decoder, experts_per_token)
        logits_RV = self.model.logits(decoded.x_RD)
        return StepOutput(
            logits_RV.view(beam_size, sentences, -1),
            decoded.weights_RS.view(beam_size, sentences, -1),
            decoded.state,
        )


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the indices of all sentences in batches, the longest first; sentences of equal length keep their order.

    The longest sentence of a batch times the number of its sentences is at most `most`. A batch has at least one.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, most // max(lengths[order[start]], _LEAST_LENGTH))
        yield order[start : start + size]
        start += size


def _described(sources: Sources, options: Options) -> str:
    longest = max(map(len, sources))
    return f"translating {len(sources):,} of up to {longest:,} subwords with beam_size={options.beam_size}"


def _without_padding(hypothesis: Hypothesis, num_positions: int) -> Hypothesis:
    attention_TS = hypothesis.attention_TS
    assert attention_TS is not None
    return hypothesis._replace(attention_TS=attention_TS[:, :num_positions].copy())
