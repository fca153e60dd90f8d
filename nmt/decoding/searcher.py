"""The search with a trained model: from the subwords of sentences to the hypotheses that translate them.

Sentences are sorted by length and searched in batches with a limit on their subwords. So memory is bounded for any
mixture of lengths. Results do not depend on the batches, and are put back in order.
"""

import gc
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import PAD, source_batch
from nmt.decoding.ensemble import States, mean_step
from nmt.decoding.rules import Rules
from nmt.decoding.sampling import Sampling, stream_of
from nmt.decoding.scoring import NOT_FINITE
from nmt.decoding.search import BeamSettings, StepOutput, beam_search, top_k
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
_NOTHING = np.zeros(0, dtype=np.int32)

Sources = Sequence[np.ndarray]
"""Subword ids of sentences, at least one each, without EOS."""


class _Asked(NamedTuple):
    """A sentence to search, or one of several draws of it."""

    source: np.ndarray  # subword ids, at least one, without EOS
    prefix: np.ndarray  # subword ids that the translation begins with
    stream: int  # number of the random stream, for sampling


class _State(NamedTuple):
    """State of a search with `Seq2Seq`: the memory has a column per sentence, the decoder one per hypothesis."""

    memory: Memory
    decoder: DecoderState

    def take_(self, after: DecoderState, columns_R: Tensor) -> None:
        self.decoder.take_(after, columns_R)

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "_State":
        return _State(self.memory.select(sentences_B), self.decoder.select(columns_R))


class Searcher:
    """A model, or an ensemble, on its device. Nothing here changes, so several threads may share it."""

    def __init__(
        self, models: Sequence[Seq2Seq], device: torch.device, forbidden: Sequence[int], slots: Collection[int] = ()
    ) -> None:
        """Keep models in the precision of their products (`WorkingWeights`).

        `forbidden` subwords are never output, except that a translation may have those `slots` that its source has.
        """
        self.models, self.device = list(models), device
        self._slots = frozenset(slots)
        self._forbidden_F = torch.tensor(forbidden, dtype=torch.int64, device=device)

    @torch.no_grad()
    def search(
        self,
        sources: Sources,
        options: Options,
        progress: Callable[[float], None] | None = None,
        prefixes: Sources = (),
    ) -> list[list[Hypothesis]]:
        """Return the best hypotheses for each source, in order; each list is best first. Draws are in order of drawing.

        `prefixes` has the subwords that each translation begins with; empty: none has a prefix. A batch for which
        memory does not suffice is halved and searched again. `progress` is called after each batch with the fraction
        of the work that is done. CheckpointError if the model's outputs are not finite. MemoryLimitError if memory does
        not suffice for a single sentence. ValueError for options that the model does not allow.
        """
        for model in self.models:
            model.check_experts_per_token(options.experts_per_token)
        draws = options.n_best if options.temperature else 1
        asked = [
            _Asked(source, prefix, stream_of(options.seed, draw, source) if options.temperature else 0)
            for source, prefix in zip(sources, prefixes or [_NOTHING] * len(sources), strict=True)
            for draw in range(draws)
        ]
        results: list[list[Hypothesis]] = [[] for _ in asked]
        most = options.batch_tokens or _BATCH_TOKENS[self.device.type]
        todo, done = sum(len(each.source) for each in asked), 0
        for chosen in batches([len(each.source) + 1 for each in asked], most):
            for index, found in zip(chosen, self._search_any([asked[i] for i in chosen], options), strict=True):
                results[index] = found
            done += sum(len(asked[index].source) for index in chosen)
            if progress:
                progress(done / todo)
        if not options.temperature:
            return results
        return [[best for (best,) in results[first : first + draws]] for first in range(0, len(results), draws)]

    def _search_any(self, asked: list[_Asked], options: Options) -> list[list[Hypothesis]]:
        """Return the hypotheses of a batch, searched in halves if memory does not suffice for the whole."""
        try:
            with shortage_told(lambda: _described(asked, options), "lower beam_size or max_source_pieces"):
                return self._search_batch(asked, options)
        except MemoryLimitError:
            if len(asked) == 1:
                raise
        # Outside of the handler, which would keep the tensors of the failed search alive.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(asked) + 1) // 2
        return [*self._search_any(asked[:half], options), *self._search_any(asked[half:], options)]

    def _search_batch(self, asked: list[_Asked], options: Options) -> list[list[Hypothesis]]:
        source_N, rows = source_batch([each.source for each in asked])
        source_N, rows = source_N.to(self.device), rows.map(lambda tensor: tensor.to(self.device))
        position_S1 = torch.arange(rows.num_positions, device=self.device)[:, None]
        sampling = Sampling(options.temperature, options.top_k, options.top_p) if options.temperature else None
        settings = BeamSettings(
            beam_size=1 if sampling else options.beam_size,
            alpha=options.alpha,
            beta=options.beta,
            keep=1 if sampling else options.n_best,
            attention=options.attention,
            margin=0.0 if sampling else options.prune_margin,
        )
        steps, states = [], []
        for model in self.models:
            memory = model.memory(model.encode(source_N, rows, options.experts_per_token)[0])
            steps.append(partial(_step, model, options.experts_per_token))
            states.append(_State(memory, model.start(settings.beam_size * len(asked))))
        found = beam_search(
            mean_step(steps) if len(steps) > 1 else steps[0],
            States(tuple(states)) if len(states) > 1 else states[0],
            # The coverage penalty is for the source's subwords only, not for its end-of-sentence position.
            wanted_BS=(position_S1 < rows.length_B - 1).T,
            rules=self._rules(asked, options),
            settings=settings,
            choose=sampling.choose if sampling else top_k,
        )
        # A sentence has no hypothesis if the outputs for it were never finite.
        if not all(hypotheses and math.isfinite(hypotheses[0].score) for hypotheses in found):
            raise CheckpointError(NOT_FINITE)
        if not options.attention:
            return found
        # Remove padding, which depends on the other sentences of the batch.
        return [
            [_without_padding(hypothesis, len(each.source) + 1) for hypothesis in hypotheses]
            for each, hypotheses in zip(asked, found, strict=True)
        ]

    def _rules(self, asked: list[_Asked], options: Options) -> Rules:
        """Return the rules of a batch. The greatest length gives way to the least one, and both to a prefix."""
        source_B = np.array([len(each.source) for each in asked])
        prefix_B = np.array([len(each.prefix) for each in asked])
        longest_B = (source_B * options.max_length_ratio).astype(np.int64) + _EXTRA_LENGTH
        longest_B = np.maximum(longest_B, np.maximum(options.min_length, prefix_B + _EXTRA_LENGTH))
        longest_B = np.minimum(longest_B, options.max_length or longest_B)
        prefix_BP = np.full((len(asked), prefix_B.max()), PAD)
        for row_P, each in zip(prefix_BP, asked, strict=True):
            row_P[: len(each.prefix)] = each.prefix
        slots = [sorted(self._slots.intersection(each.source.tolist())) for each in asked]
        slots_BG = np.full((len(asked), max(map(len, slots))), PAD)
        for row_G, found in zip(slots_BG, slots, strict=True):
            row_G[: len(found)] = found
        return Rules(
            torch.full((len(asked),), max(options.min_length, 1), device=self.device),
            torch.from_numpy(np.maximum(longest_B, prefix_B + 1)).to(self.device),
            self._forbidden_F,
            prefix_BP=torch.from_numpy(prefix_BP).to(self.device) if prefix_B.any() else None,
            no_repeat=options.no_repeat_ngram,
            stream_B=torch.tensor([each.stream for each in asked], device=self.device) if options.temperature else None,
            slots_BG=torch.from_numpy(slots_BG).to(self.device) if any(slots) else None,
        )


def _step(model: Seq2Seq, experts_per_token: int, previous_KB: Tensor, state: _State) -> StepOutput:
    beam_size, sentences = previous_KB.shape
    decoded = model.step(previous_KB.reshape(-1), state.memory, state.decoder, experts_per_token)
    logits_RV = model.logits(decoded.x_RD)
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


def _described(asked: list[_Asked], options: Options) -> str:
    longest = max(len(each.source) for each in asked)
    return f"translating {len(asked):,} of up to {longest:,} subwords with beam_size={options.beam_size}"


def _without_padding(hypothesis: Hypothesis, num_positions: int) -> Hypothesis:
    attention_TS = hypothesis.attention_TS
    assert attention_TS is not None
    return hypothesis._replace(attention_TS=attention_TS[:, :num_positions].copy())
