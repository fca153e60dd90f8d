"""Translation of lines of text by a trained model: one translation per line, in order.

A line is returned unchanged if it has no letters or digits that are in the vocabulary. A line that is too long is
translated in parts (nmt/text/segment.py). A translation never contains a line break. The search sorts lines by length,
and results are put back in order.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import EOS, source_batch
from nmt.checkpoint import Checkpoint
from nmt.config import Config, DecodingConfig
from nmt.data.subwords import Subwords, one_line
from nmt.decoding.search import BeamSettings, Limits, StepOutput, beam_search, length_penalty
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options, TextHypothesis, Translation
from nmt.device import pick_device, product_dtype, set_float32_products
from nmt.errors import CheckpointError
from nmt.model.attention import Memory
from nmt.model.seq2seq import DecoderState, Seq2Seq
from nmt.model.working import WorkingWeights
from nmt.parameters import read_model
from nmt.run import RunDirectory
from nmt.text.segment import join, split

# A translation may have this many more subwords than max_length_ratio allows, for the sake of short sentences.
_EXTRA_LENGTH = 10
_NOTHING = np.zeros(0, dtype=np.int32)


class _State(NamedTuple):
    """State of a search with `Seq2Seq`: the memory has a column per sentence, the decoder one per hypothesis."""

    memory: Memory
    decoder: DecoderState | None

    def select(self, columns_R: Tensor) -> "_State":
        return self._replace(decoder=self.decoder.select(columns_R) if self.decoder else None)

    def shrink(self, sentences_B: Tensor) -> "_State":
        return self._replace(memory=self.memory.select(sentences_B))


class _Part(NamedTuple):
    """A translated line, or a translated part of a line."""

    source: np.ndarray  # subword ids, without EOS
    texts: list[str]  # of the hypotheses; if there are none, the source text
    hypotheses: list[Hypothesis]  # empty if there was nothing to translate
    unlearned: str


class Translator:
    """A model, its vocabulary and the options of the search. Nothing here changes, so several threads may share it.

    The model is used in the precision of `decoding.precision`; bf16 has its own copy, made once (`WorkingWeights`).
    """

    def __init__(
        self,
        model: Seq2Seq,
        subwords: Subwords,
        decoding: DecodingConfig,
        device: torch.device,
        longest_seen: int = 0,
        steps: Sequence[int] = (),
    ) -> None:
        """Prepare a trained model for translation.

        `longest_seen` is `longest_source` of its run; 0 if unknown. `steps` are the training steps whose parameters, or
        mean of parameters, the model has; empty if unknown. ValueError if `decoding` is not possible with the model.
        """
        model.check_experts_per_token(decoding.experts_per_token)
        dtype = product_dtype(device, decoding.precision)
        self.model = WorkingWeights(model, device, dtype).model
        self.subwords = subwords
        self.options = Options.of(decoding)
        """Default options of a call."""
        self.device = device
        self.longest_seen = longest_seen
        self.steps = list(steps)
        self._forbidden_F = torch.tensor(subwords.forbidden_ids, dtype=torch.int64, device=device)

    @classmethod
    def load(cls, run: RunDirectory, config: Config) -> "Translator":
        """Return the translator of a run, with the checkpoint of `config.decoding`, or of an exported model.

        CheckpointError as for `load_model`.
        """
        device = pick_device(config.decoding.device, "decoding.device")
        set_float32_products(device, config.decoding.precision)
        loaded = load_model(run, config)
        longest = longest_source(run.corpus_info(), config)
        return cls(loaded.model, loaded.subwords, config.decoding, device, longest, loaded.steps)

    def max_pieces(self, options: Options | None = None) -> int:
        """Return the most subwords that are translated as a whole; no more than the longest training line has."""
        limit = (options or self.options).max_source_pieces
        return min(limit, self.longest_seen) if self.longest_seen else limit

    def translate(
        self,
        lines: Sequence[str],
        options: Options | None = None,
        *,
        long: Collection[int] = (),
        progress: Callable[[float], None] | None = None,
    ) -> list[Translation]:
        """Return the translation of each line, in order; `options`: None for `self.options`.

        Any text counts as a line. Lines of more than `max_pieces` subwords are translated in parts. So are the lines
        whose indices are in `long`: each is a piece of a longer line. `progress` is called after each batch with the
        fraction of the work that is done.
        CheckpointError if the model's outputs are not finite. ValueError for options that the model does not allow.
        """
        options = options or self.options
        fits = partial(self._fit, self.max_pieces(options))
        parts = [
            [line] if short and place not in long else split(line, fits)
            for place, (line, short) in enumerate(zip(lines, fits(lines), strict=True))
        ]
        translated = iter(self._parts([text for each in parts for text in each], options, progress))
        return [
            self._joined(each, list(islice(translated, len(each))), place in long, options)
            for place, each in enumerate(parts)
        ]

    def _parts(self, texts: list[str], options: Options, progress: Callable[[float], None] | None) -> Iterator[_Part]:
        """Translate texts that are short enough, and yield the translations in order."""
        unlearned = [self.subwords.unlearned(text) if has_words(text) else "" for text in texts]
        wordy = [place for place, text in enumerate(texts) if has_words(text, unlearned[place])]
        encoded = self.subwords.encode_batch([texts[place] for place in wordy])
        sources = {place: pieces for place, pieces in zip(wordy, encoded, strict=True) if len(pieces)}
        found = dict(zip(sources, self.search(list(sources.values()), options, progress), strict=True))
        for place, text in enumerate(texts):
            hypotheses = found.get(place, [])
            decoded = [self.subwords.decode(each.tokens) for each in hypotheses]
            yield _Part(sources.get(place, _NOTHING), decoded or [one_line(text)], hypotheses, unlearned[place])

    def _joined(self, texts: list[str], parts: list[_Part], cut: bool, options: Options) -> Translation:
        """Return the translation of a line from those of its parts; `cut`: the line is a piece of a longer line."""
        count = max(len(part.hypotheses) for part in parts)
        alone = len(parts) == 1 and not cut
        ranked = []
        for rank in range(max(count, 1)):
            shown = [part.texts[min(rank, len(part.texts) - 1)] for part in parts]
            # Strip the parts, as `join` adds the blanks between them.
            ranked.append(shown[0] if alone else join(texts, [text.strip() for text in shown]))
        hypotheses = tuple(self._hypothesis(ranked[rank], rank, parts, options) for rank in range(count))
        best = hypotheses[0] if hypotheses else None
        read = [part.source for part in parts if part.hypotheses] if options.attention else []
        return Translation(
            text=ranked[0],
            score=best.score if best else 0.0,
            num_parts=len(parts),
            finished=best.finished if best else True,
            unlearned="".join(part.unlearned for part in parts),
            source_pieces=tuple(piece for source in read for piece in self.subwords.pieces([*source, EOS])),
            hypotheses=hypotheses,
        )

    def _hypothesis(self, text: str, rank: int, parts: list[_Part], options: Options) -> TextHypothesis:
        """Return hypothesis number `rank` of a line, whose text is `text`, from the hypotheses of its parts."""
        found = [part.hypotheses[min(rank, len(part.hypotheses) - 1)] for part in parts if part.hypotheses]
        attention = [each.attention_TS for each in found if each.attention_TS is not None]
        return TextHypothesis(
            text=text,
            score=_score(found, options.alpha),
            finished=all(each.finished for each in found),
            pieces=tuple(
                piece for each in found for piece in self.subwords.pieces([*each.tokens, *[EOS] * each.finished])
            ),
            log_probs=tuple(log_prob for each in found for log_prob in each.token_log_probs),
            attention=_block_diagonal(attention) if attention else None,
        )

    def _fit(self, most: int, texts: Sequence[str]) -> list[bool]:
        """Return which texts have at most `most` subwords."""
        return [len(pieces) <= most for pieces in self.subwords.encode_batch(texts)]

    @torch.no_grad()
    def search(
        self,
        sources: Sequence[np.ndarray],
        options: Options | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """Return the best hypotheses for each source, in order; each list is best first.

        A source has at least one subword. Other arguments and errors are as for `translate`.
        """
        options = options or self.options
        self.model.check_experts_per_token(options.experts_per_token)
        results: list[list[Hypothesis]] = [[] for _ in sources]
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        size = options.batch_sentences
        todo = sum(map(len, sources))
        done = 0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found = self._search_batch([sources[i] for i in chosen], options)
            for index, result in zip(chosen, found, strict=True):
                results[index] = result
            done += sum(len(sources[index]) for index in chosen)
            if progress:
                progress(done / todo)
        return results

    def _search_batch(self, sources: list[np.ndarray], options: Options) -> list[list[Hypothesis]]:
        source_N, rows = source_batch(sources)
        source_N, rows = source_N.to(self.device), rows.map(lambda tensor: tensor.to(self.device))
        encoded, _ = self.model.encode(source_N, rows, options.experts_per_token)
        memory = self.model.memory(encoded)
        position_S1 = torch.arange(rows.num_positions, device=self.device)[:, None]
        longest_B = ((rows.length_B - 1) * options.max_length_ratio).long() + _EXTRA_LENGTH
        found = beam_search(
            partial(self._step, options.experts_per_token),
            _State(memory, None),
            # The coverage penalty is for the source's subwords only, not for its end-of-sentence position.
            wanted_BS=(position_S1 < rows.length_B - 1).T,
            limits=Limits(torch.ones_like(longest_B), longest_B, self._forbidden_F),
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
            state._replace(decoder=decoded.state),
        )


def _score(found: list[Hypothesis], alpha: float) -> float:
    """Return the score (GNMT eq. 14) of one or more hypotheses taken as one."""
    if len(found) == 1:
        return found[0].score
    lengths = [len(each.token_log_probs) for each in found]
    coverage = sum(
        each.score - each.log_prob / length_penalty(length, alpha) for each, length in zip(found, lengths, strict=True)
    )
    return float(sum(each.log_prob for each in found) / length_penalty(sum(lengths), alpha) + coverage)


def _without_padding(hypothesis: Hypothesis, num_positions: int) -> Hypothesis:
    attention_TS = hypothesis.attention_TS
    assert attention_TS is not None
    return hypothesis._replace(attention_TS=attention_TS[:, :num_positions].copy())


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Return a matrix with these blocks from the upper left to the lower right, and 0 elsewhere."""
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), dtype=np.float32)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def has_words(text: str, unlearned: str = "") -> bool:
    """Return whether a text has something to translate: a letter or digit of any script that is not in `unlearned`."""
    return any(character.isalnum() and character not in unlearned for character in text)


def longest_source(corpus: Mapping[str, Any], config: Config) -> int:
    """Return the subwords of the longest source line in the training text, as recorded in `corpus`; 0: unknown.

    If an older version wrote `corpus` without it, this is the limit of the filter for long lines. CheckpointError if
    the record is not a number of subwords.
    """
    longest = corpus.get("longest_source_pieces", config.corpus.filters.max_pieces)
    if not isinstance(longest, int) or longest < 0:
        raise CheckpointError(f"corpus.json is damaged: longest_source_pieces={longest!r} is not a number of subwords")
    return longest


class Loaded(NamedTuple):
    """A loaded model, on the CPU and in evaluation mode."""

    model: Seq2Seq
    subwords: Subwords
    checkpoints: list[Checkpoint]
    """The checkpoints whose parameters, or mean of parameters, the model has."""

    @property
    def steps(self) -> list[int]:
        """Steps of all these checkpoints."""
        return [step for checkpoint in self.checkpoints for step in checkpoint.steps]


def load_model(run: RunDirectory, config: Config) -> Loaded:
    """Return the model of a run, with the checkpoint of `config.decoding`, or an exported model.

    CheckpointError if the run, its checkpoint or its vocabulary is missing or damaged, or if they do not fit together.
    """
    subwords = load_vocabulary(run)
    chosen = run.chosen(config.decoding)
    while True:
        try:
            return Loaded(read_model(chosen, config.model, subwords.size, subwords.fingerprint), subwords, chosen)
        except CheckpointError:
            # If the run is being trained, newer checkpoints may have replaced the selected ones: select again.
            listed, chosen = chosen, run.chosen(config.decoding)
            if chosen == listed:
                raise


def load_vocabulary(run: RunDirectory) -> Subwords:
    """Return the vocabulary of a run. CheckpointError if it is missing or damaged."""
    try:
        return Subwords.load(run.subwords_path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
