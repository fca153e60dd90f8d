"""Text to text: a trained model behind one method that answers every line at its place.

A line without a letter or digit that the model knows comes back as it is, one that is too long is translated in parts
(nmt/text/segment.py), and nothing a model outputs can break a line in two. Lines are sorted by length for the
search and put back in order.
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
from nmt.model.grouped import check_widths
from nmt.model.seq2seq import DecoderState, Seq2Seq
from nmt.model.working import WorkingWeights
from nmt.parameters import read_model
from nmt.run import RunDirectory
from nmt.text.segment import join, split

# A translation may be this much longer than max_length_ratio allows: short sentences need the room.
_EXTRA_LENGTH = 10
_NOTHING = np.zeros(0, dtype=np.int32)


class _State(NamedTuple):
    """What a search over `Seq2Seq` carries: the memory once per sentence, the decoder once per hypothesis."""

    memory: Memory
    decoder: DecoderState | None

    def select(self, columns_R: Tensor) -> "_State":
        return self._replace(decoder=self.decoder.select(columns_R) if self.decoder else None)

    def shrink(self, sentences_B: Tensor) -> "_State":
        return self._replace(memory=self.memory.select(sentences_B))


class _Part(NamedTuple):
    """A translated line, or part of one."""

    source: np.ndarray  # pieces, without EOS
    texts: list[str]  # of the hypotheses; at least one
    hypotheses: list[Hypothesis]  # none where there was nothing to translate
    unlearned: str


class Translator:
    """A model, its vocabulary and how to search with them. Nothing of it changes: several threads may use it.

    It is used in the precision that `decoding` names: in bf16 as a copy of its own, made once (`WorkingWeights`).
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
        """Take a trained model; `longest_seen` is `longest_source` of its run, 0 if that is not known.

        `steps`: the steps of training whose parameters, or the mean of them, the model has, if they are known.
        """
        model.check_experts_per_token(decoding.experts_per_token)
        dtype = product_dtype(device, decoding.precision)
        check_widths(model.config, device, dtype, "decoding.precision")
        self.model = WorkingWeights(model, device, dtype).model
        self.subwords = subwords
        self.options = Options.of(decoding)
        """Those of a call that gives none."""
        self.device = device
        self.longest_seen = longest_seen
        self.steps = list(steps)
        self._forbidden_F = torch.tensor(subwords.forbidden_ids, dtype=torch.int64, device=device)

    @classmethod
    def load(cls, run: RunDirectory, config: Config) -> "Translator":
        """The translator of a run at the checkpoint that `config.decoding` names, or of an exported model.

        CheckpointError as for `load_model`.
        """
        device = pick_device(config.decoding.device, "decoding.device")
        set_float32_products(device, config.decoding.precision)
        loaded = load_model(run, config)
        longest = longest_source(run.corpus_info(), config)
        return cls(loaded.model, loaded.subwords, config.decoding, device, longest, loaded.steps)

    def max_pieces(self, options: Options | None = None) -> int:
        """Pieces of the longest text that is translated as a whole: no longer than any line it was trained on."""
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
        """The translation of each line, in order. Any text is a line. `options`: None for `self.options`.

        Lines of more than `max_pieces` pieces are translated in parts, and so are those with their places in `long`:
        pieces of a longer one. `progress` is called now and then with the share of the work that is done.
        CheckpointError if the model's outputs are not finite; ValueError for options that the model does not allow.
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
        """The translations of texts that fit."""
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
        """The translation of a line from those of its parts; `cut`: the line is itself a piece of a longer one."""
        count = max(len(part.hypotheses) for part in parts)
        alone = len(parts) == 1 and not cut
        ranked = []
        for rank in range(max(count, 1)):
            shown = [part.texts[min(rank, len(part.texts) - 1)] for part in parts]
            # Blanks around a part belong to the seam.
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
        """Number `rank` of a line, `text`, from those of its parts."""
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
        """Which texts have at most so many pieces."""
        return [len(pieces) <= most for pieces in self.subwords.encode_batch(texts)]

    @torch.no_grad()
    def search(
        self,
        sources: Sequence[np.ndarray],
        options: Options | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """The best hypotheses for sources given as pieces (at least one each), in their order; each list best first.

        Arguments and errors as for `translate`.
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
        source_SB, length_B, rows_N = (tensor.to(self.device) for tensor in source_batch(sources))
        memory, _ = self.model.encode(source_SB, length_B, rows_N, options.experts_per_token)
        longest_B = ((length_B - 1) * options.max_length_ratio).long() + _EXTRA_LENGTH
        found = beam_search(
            partial(self._step, options.experts_per_token),
            _State(memory, None),
            # The end-of-sentence position need not be attended to: only the source's own pieces want covering.
            wanted_BS=(~memory.padding_SB & (source_SB != EOS)).T,
            limits=Limits(torch.ones_like(longest_B), longest_B, self._forbidden_F),
            settings=BeamSettings(
                options.beam_size, options.alpha, options.beta, options.n_best, attention=options.attention
            ),
        )
        # A sentence without a hypothesis, too, had no finite output.
        if not all(hypotheses and math.isfinite(hypotheses[0].score) for hypotheses in found):
            raise CheckpointError(
                "the model's outputs are not finite (NaN or infinite): its parameters are damaged, choose another "
                "decoding.checkpoint or model"
            )
        if not options.attention:
            return found
        # Padding belongs to the batch, not to the sentence.
        return [
            [_without_padding(hypothesis, len(source) + 1) for hypothesis in hypotheses]
            for source, hypotheses in zip(sources, found, strict=True)
        ]

    def _step(self, experts_per_token: int, previous_KB: Tensor, state: _State) -> StepOutput:
        beam_size, sentences = previous_KB.shape
        decoded = self.model.decode(
            previous_KB.reshape(1, -1), state.memory, state.decoder, experts_per_token=experts_per_token
        )
        logits_RV = self.model.logits(decoded.x_TRD[0])
        return StepOutput(
            logits_RV.view(beam_size, sentences, -1),
            decoded.weights_TRS[0].view(beam_size, sentences, -1),
            state._replace(decoder=decoded.state),
        )


def _score(found: list[Hypothesis], alpha: float) -> float:
    """GNMT eq. 14 of several hypotheses, at least one, taken as one."""
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
    """The blocks from the upper left to the lower right, and 0 elsewhere."""
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), dtype=np.float32)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


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
