"""The search with a trained model: from the subwords of sentences to the hypotheses that translate them.

Sentences are sorted by length and searched in batches with a limit on their subwords. So memory is bounded for any
mixture of lengths. Results do not depend on the batches, and are put back in order.
"""

import gc
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nmt.batch import Rows, source_batch
from nmt.decoding.ensemble import States, mean_step
from nmt.decoding.lanes import Lanes, Task, rounded_length, wanted_sources
from nmt.decoding.rules import Rules
from nmt.decoding.sampling import Sampling, stream_of
from nmt.decoding.scoring import NOT_FINITE
from nmt.decoding.search import BeamSettings, StepOutput, beam_search, top_k
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.device import shortage_told
from nmt.errors import CheckpointError, MemoryLimitError
from nmt.model.attention import Memory
from nmt.model.kernels.top_k import never_waits
from nmt.model.loss import output_logits
from nmt.model.seq2seq import DecoderState, Seq2Seq
from nmt.tokens import PAD

# A translation may have this many more subwords than max_length_ratio allows, for the sake of short sentences.
_EXTRA_LENGTH = 10
# Subwords per batch, by the device, if `decoding.batch_tokens` is 0.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Shorter sentences count as this long, since the scores of the vocabulary take memory for each sentence.
_LEAST_LENGTH = 16
_NOTHING = np.zeros(0, dtype=np.int32)

# Kinds of searches whose recordings are kept. Lines with tags need the attention, and retries have other settings.
_MOST_KINDS = 4

Sources = Sequence[np.ndarray]
"""Subword ids of sentences, at least one each, without EOS."""

Reader = Callable[[], list[list[Hypothesis]]]
"""Reads the hypotheses of a batch that has been searched."""

T = TypeVar("T")


class _Asked(NamedTuple):
    """A sentence to search, or one of several draws of it."""

    source: np.ndarray  # ids of symbols, then of subwords, at least one, without EOS
    symbols: int  # number of symbols, as many as in all other sentences of the search
    prefix: np.ndarray  # subword ids that the translation begins with
    stream: int  # number of the random stream, for sampling

    @property
    def pieces(self) -> int:
        """Number of subwords of the source."""
        return len(self.source) - self.symbols


class _State(NamedTuple):
    """State of a search with `Seq2Seq`: the memory has a column per sentence, the decoder one per hypothesis."""

    memory: Memory
    decoder: DecoderState

    def take_(self, after: DecoderState, columns_R: Tensor) -> None:
        self.decoder.take_(after, columns_R)

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "_State":
        return _State(self.memory.select(sentences_B), self.decoder.select(columns_R))

    def restart_(self) -> None:
        for tensor in self.decoder.tensors():
            tensor.zero_()

    def copy_(self, other: "_State") -> None:
        for own, new in zip(self.memory, other.memory, strict=True):
            own.copy_(new)
        for own, new in zip(self.decoder.tensors(), other.decoder.tensors(), strict=True):
            own.copy_(new)


class Searcher:
    """A model, or an ensemble, on its device. Several threads may share it. On a GPU, they take turns."""

    def __init__(
        self, models: Sequence[Seq2Seq], device: torch.device, forbidden: Sequence[int], slots: Collection[int] = ()
    ) -> None:
        """Keep models in the precision of their products (`WorkingWeights`).

        `forbidden` subwords are never output, except that a translation may have those `slots` that its source has.
        """
        self.models, self.device = list(models), device
        self._slots = np.array(sorted(slots), dtype=np.int64)
        self.forbidden_F = torch.tensor(forbidden, dtype=torch.int64, device=device)
        self.records = can_record(self.models, device)
        """Whether searches are recorded and replayed."""
        self._lanes: dict[tuple[Any, ...], Lanes] = {}
        self._turn = Lock()

    @torch.no_grad()
    def search(
        self,
        sources: Sources,
        options: Options,
        progress: Callable[[float], None] | None = None,
        prefixes: Sources = (),
        symbols: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        """Return the best hypotheses for each source, in order; each list is best first. Draws are in order of drawing.

        `prefixes` has the subwords that each translation begins with; empty: none has a prefix. `symbols` are ids that
        the model reads before each source. They need no coverage, and the attention has no columns for them. A batch
        for which memory does not suffice is halved and searched again. `progress` is called after each batch with the
        fraction of the work that is done. CheckpointError if the model's outputs are not finite. MemoryLimitError if
        memory does not suffice for a single sentence. ValueError for options that the model does not allow.
        """
        for model in self.models:
            model.check_experts_per_token(options.experts_per_token)
        draws = options.n_best if options.temperature else 1
        read = [np.concatenate([symbols, source], dtype=np.int64) for source in sources] if symbols else sources
        asked = [
            _Asked(source, len(symbols), prefix, stream_of(options.seed, draw, source) if options.temperature else 0)
            for source, prefix in zip(read, prefixes or [_NOTHING] * len(sources), strict=True)
            for draw in range(draws)
        ]
        with self._turn if self.records else nullcontext():
            results = self._search_all(asked, options, progress)
        if not options.temperature:
            return results
        return [[best for (best,) in results[first : first + draws]] for first in range(0, len(results), draws)]

    def _search_all(
        self, asked: list[_Asked], options: Options, progress: Callable[[float], None] | None
    ) -> list[list[Hypothesis]]:
        results: list[list[Hypothesis]] = [[] for _ in asked]
        lengths = [len(each.source) + 1 for each in asked]
        most = options.batch_tokens or _BATCH_TOKENS[self.device.type]
        todo, done = sum(lengths), 0
        # The host reads the results of a batch while the device searches the next one.
        chosen: list[int] = []
        read: Reader = list
        for following in [*batches(lengths, most, self.records), []]:
            batch = [asked[index] for index in following]
            finish = self._begin(batch, options) if batch else lambda: list
            for index, found in zip(chosen, read(), strict=True):
                results[index] = found
            done += sum(lengths[index] for index in chosen)
            if progress and chosen:
                progress(done / todo)
            chosen, read = following, finish()
        return results

    def _begin(self, batch: list[_Asked], options: Options) -> Callable[[], Reader]:
        """Begin the search of a batch, and return a function that finishes it.

        If memory does not suffice, the batch is searched in halves.
        """

        def finish() -> Reader:
            if launched and (read := _within_memory(launched, batch, options)):
                return read
            gc.collect()
            if self.device.type == "cuda":
                self._lanes.clear()
                torch.cuda.empty_cache()
            half = (len(batch) + 1) // 2
            found = [each for part in (batch[:half], batch[half:]) for each in self._begin(part, options)()()]
            return lambda: found

        launched = _within_memory(lambda: self._launch(batch, options), batch, options)
        return finish

    def _launch(self, batch: list[_Asked], options: Options) -> Callable[[], Reader]:
        """Do what `_begin` does, for a batch that memory suffices for."""
        rules = self._rules(batch, options)
        if self.records and self._recordable(rules, options):
            running = self.lanes(options).begin([each.source for each in batch], rules, batch[0].symbols)

            def finish() -> Reader:
                read = running.finish()
                return lambda: _checked(batch, read(), options)

            return finish
        return lambda: partial(_checked, batch, self._search_live(batch, rules, options), options)

    def _recordable(self, rules: Rules, options: Options) -> bool:
        """Return whether the search of a batch can be recorded."""
        vocabulary = self.models[0].output.out_features
        return rules.fits_all and not options.temperature and never_waits(vocabulary, 2 * options.beam_size)

    def _search_live(self, batch: list[_Asked], rules: Rules, options: Options) -> list[list[Hypothesis]]:
        """Search a batch without a recording."""
        source_N, rows = source_batch([each.source for each in batch])
        source_N, rows = source_N.to(self.device), rows.map(lambda tensor: tensor.to(self.device))
        sampling = Sampling(options.temperature, options.top_k, options.top_p) if options.temperature else None
        settings, count = _settings(options), options.experts_per_token
        steps = [partial(_step, model, count) for model in self.models]
        states = [
            _start(model, settings.beam_size, _encode(model, count, source_N, rows), len(batch))
            for model in self.models
        ]
        return beam_search(
            mean_step(steps) if len(steps) > 1 else steps[0],
            States(tuple(states)) if len(states) > 1 else states[0],
            wanted_BS=wanted_sources(rows, batch[0].symbols),
            rules=rules.map(lambda tensor: tensor.to(self.device)),
            settings=settings,
            choose=sampling.choose if sampling else top_k,
        )

    def lanes(self, options: Options) -> Lanes:
        """Return the lanes for searches with these options; those for too many other options are given up."""
        (model,), count = self.models, options.experts_per_token
        lengths = options.max_length_ratio, options.min_length, options.max_length, options.no_repeat_ngram
        kind = (_settings(options), count, *lengths)
        if kind not in self._lanes:
            while len(self._lanes) >= _MOST_KINDS:
                del self._lanes[next(iter(self._lanes))]
            task = Task(
                encode=partial(_encode, model, count),
                start=partial(_start, model, options.beam_size),
                step=partial(_step, model, count, biased=False),
                choose=partial(top_k, bias_V=model.output.bias),
                settings=_settings(options),
                forbidden_F=self.forbidden_F,
                no_repeat=options.no_repeat_ngram,
                longest=lambda pieces: int(_longest(options, np.array(pieces), np.array(0))),
            )
            self._lanes[kind] = Lanes(task, self.device)
        return self._lanes[kind]

    def _rules(self, asked: list[_Asked], options: Options) -> Rules:
        """Return the rules of a batch, on the host but for the forbidden subwords."""
        prefix_B = np.array([len(each.prefix) for each in asked])
        longest_B = _longest(options, np.array([each.pieces for each in asked]), prefix_B)
        # Most batches have no slots, which is seen for all sentences at once.
        whole_N = np.concatenate([each.source for each in asked])
        slots = []
        if np.isin(whole_N, self._slots).any():
            slots = [np.intersect1d(each.source, self._slots) for each in asked]
        return Rules(
            torch.full((len(asked),), max(options.min_length, 1)),
            torch.from_numpy(longest_B),
            self.forbidden_F,
            prefix_BP=_padded([each.prefix for each in asked]) if prefix_B.any() else None,
            no_repeat=options.no_repeat_ngram,
            stream_B=torch.tensor([each.stream for each in asked]) if options.temperature else None,
            slots_BG=_padded(slots) if slots else None,
        )


def _padded(rows: Sources) -> Tensor:
    """Return rows of subwords as one tensor, with PAD at their ends."""
    padded = np.full((len(rows), max(map(len, rows))), PAD)
    for row, pieces in zip(padded, rows, strict=True):
        row[: len(pieces)] = pieces
    return torch.from_numpy(padded)


def _encode(model: Seq2Seq, experts_per_token: int, source_N: Tensor, rows: Rows) -> Memory:
    return model.memory(model.encode(source_N, rows, experts_per_token)[0])


def _start(model: Seq2Seq, beam_size: int, memory: Memory, sentences: int) -> _State:
    return _State(memory, model.start(beam_size * sentences))


def _step(
    model: Seq2Seq, experts_per_token: int, previous_KB: Tensor, state: _State, *, biased: bool = True
) -> StepOutput:
    """Run a model for one position. Unless `biased`, the logits are without the softmax layer's bias."""
    beam_size, sentences = previous_KB.shape
    decoded = model.step(previous_KB.reshape(-1), state.memory, state.decoder, experts_per_token)
    x_RD = decoded.x_RD
    logits_RV = model.logits(x_RD) if biased else output_logits(x_RD, model.output.weight, None)
    return StepOutput(
        logits_RV.view(beam_size, sentences, -1), decoded.weights_RS.view(beam_size, sentences, -1), decoded.state
    )


def can_record(models: Sequence[Seq2Seq], device: torch.device) -> bool:
    """Return whether searches with these models can be recorded: a single one, on a GPU, that never needs the host.

    Tokens with different numbers of experts, and experts of other processes, need it.
    """
    waits = any(model.config.moe.k_is_average or model.share.size > 1 for model in models)
    return device.type == "cuda" and len(models) == 1 and not waits


def batches(lengths: Sequence[int], most: int, rounded: bool = False) -> Iterator[list[int]]:
    """Yield the indices of all sentences in batches, the longest first; sentences of equal length keep their order.

    The longest sentence of a batch times the number of its sentences is at most `most`. A batch has at least one. With
    `rounded`, this is so for the lane of the batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        size = max(1, most // max(rounded_length(longest) if rounded else longest, _LEAST_LENGTH))
        size = 1 << size.bit_length() - 1 if rounded else size
        yield order[start : start + size]
        start += size


def _longest(options: Options, source_B: np.ndarray, prefix_B: np.ndarray) -> np.ndarray:
    """Return the greatest lengths of translations, with their ends, by the subwords of sources and prefixes.

    The greatest length gives way to the least one, and both to a prefix.
    """
    longest_B = (source_B * options.max_length_ratio).astype(np.int64) + _EXTRA_LENGTH
    longest_B = np.maximum(longest_B, np.maximum(options.min_length, prefix_B + _EXTRA_LENGTH))
    longest_B = np.minimum(longest_B, options.max_length or longest_B)
    return np.maximum(longest_B, prefix_B + 1)


def _settings(options: Options) -> BeamSettings:
    """Return the settings of a search; draws are searches of one hypothesis each."""
    if options.temperature:
        return BeamSettings(1, options.alpha, options.beta, attention=options.attention)
    return BeamSettings(
        beam_size=options.beam_size,
        alpha=options.alpha,
        beta=options.beta,
        keep=options.n_best,
        attention=options.attention,
        margin=options.prune_margin,
    )


def _within_memory(work: Callable[[], T], batch: list[_Asked], options: Options) -> T | None:
    """Return the result of the work, or None if memory does not suffice for a batch of several sentences."""
    try:
        with shortage_told(lambda: _described(batch, options), "lower beam_size or max_source_pieces"):
            return work()
    except MemoryLimitError:
        if len(batch) == 1:
            raise
    return None


def _checked(batch: list[_Asked], found: list[list[Hypothesis]], options: Options) -> list[list[Hypothesis]]:
    """Return what a search found. CheckpointError if the model's outputs are not finite."""
    # A sentence has no hypothesis if the outputs for it were never finite.
    if not all(hypotheses and math.isfinite(hypotheses[0].score) for hypotheses in found):
        raise CheckpointError(NOT_FINITE)
    if not options.attention:
        return found
    return [
        [_with_attention_of(each, hypothesis) for hypothesis in hypotheses]
        for each, hypotheses in zip(batch, found, strict=True)
    ]


def _described(asked: list[_Asked], options: Options) -> str:
    longest = max(each.pieces for each in asked)
    return f"translating {len(asked):,} of up to {longest:,} subwords with beam_size={options.beam_size}"


def _with_attention_of(asked: _Asked, hypothesis: Hypothesis) -> Hypothesis:
    """Return a hypothesis with the attention to the subwords of its source and their end.

    What is left out is the attention to symbols, and padding, which depends on the other sentences of the batch.
    """
    attention_TS = hypothesis.attention_TS
    assert attention_TS is not None
    return hypothesis._replace(attention_TS=attention_TS[:, asked.symbols : len(asked.source) + 1].copy())
