"""A teacher: a model, or an ensemble, whose translations become the targets of a student's training text.

A student of the teacher's translations gains more than one of references alone (Kim & Rush 2016, sequence level): they
are more regular, and so easier to learn for a small model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from nmt.config import Config, Direction
from nmt.data.held_out import HeldOut
from nmt.data.shards import TEACHER_BEST, ids_dtype, teacher_dtype
from nmt.data.subwords import RESERVED, Subwords
from nmt.decoding.retry import search_again, troubles
from nmt.decoding.scoring import best_subwords
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translator import Translator
from nmt.evaluation.mbr import likeness
from nmt.evaluation.tokenizers import bleu_tokenizer
from nmt.run import RunDirectory

CHOICES = ("best", "chrf", "bleu")
"""Which of the translations in the beam is the target: the best, or the one most like the reference by this metric."""
WHY_KEPT = {
    "symbols": "with placeholders or marked terms",
    "length": "with a source that is empty or too long for the teacher",
    "trouble": "where the teacher repeats itself or gives nothing",
    "cut": "where the teacher does not end",
    "filtered": "where its translation is longer than corpus.filters.max_pieces",
}
"""Pairs that keep their reference, by the reason."""


class Taught(NamedTuple):
    """What a teacher makes of some pairs."""

    texts: list[str | None]
    """The new target of each pair; None: the reference stays."""
    kept: dict[str, int]
    """Number of pairs whose reference stays, by the key of `WHY_KEPT`."""
    teacher_N: np.ndarray | None = None
    """The teacher's rows (`nmt.data.shards.teacher_dtype`) for all target positions, with EOS, of the pairs."""


class Teacher:
    """A trained run, an exported model, or an ensemble."""

    def __init__(self, run: RunDirectory, config: Config, choose: str) -> None:
        """Load the run with `config.decoding`; `choose` is one of `CHOICES`. CheckpointError as `Translator.load`."""
        self.translator = Translator.load(run, config)
        self.choose, self._tokenize = choose, config.evaluation.tokenize
        options = self.translator.options
        self.options = options if choose == "best" else replace(options, n_best=options.beam_size)

    def teach(
        self,
        sources: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
        subwords: Subwords,
        direction: Direction,
        tag: str = "",
        progress: Callable[[float], None] | None = None,
    ) -> Taught:
        """Return the new targets of pairs, given as subword ids of the vocabulary `subwords`.

        Another vocabulary than the teacher's is no obstacle, as the text is what is translated, with the punctuation
        that the teacher has learned. `progress` is called with the fraction of the search that is done. A `tag` that
        the teacher does not know is left out. UserError for a direction that the teacher does not translate; other
        errors are those of `Searcher.search`.
        """
        texts = subwords.decode_batch([ids.tolist() for ids in sources])
        own, kept = self._readable(sources, texts, subwords, direction)
        found = self._search(own, self._symbols(direction, tag), texts, progress)
        good, troubled = self._good(found, texts)
        kept.update(troubled)
        targets: list[str | None] = [None] * len(sources)
        for pair, candidates in good.items():
            targets[pair] = candidates[0]
            if self.choose != "best" and len(candidates) > 1:
                tokenizer = bleu_tokenizer(self._tokenize, direction.target).name
                alike = likeness(self.choose, tokenizer)(candidates, subwords.decode(references[pair].tolist()))
                targets[pair] = candidates[int(np.argmax(alike))]
        return Taught(targets, dict(kept))

    def probabilities(
        self,
        sources: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        subwords: Subwords,
        direction: Direction,
        tag: str = "",
    ) -> np.ndarray:
        """Return the rows (`nmt.data.shards.teacher_dtype`) of all positions of the targets, with EOS, pair by pair.

        A row has the subwords that the teacher finds most probable there, after the target's subwords before it (word
        level, Kim & Rush 2016). The rows of a source that the teacher cannot read are zeros. The vocabulary must be the
        teacher's. Otherwise as `teach`.
        """
        texts = subwords.decode_batch([ids.tolist() for ids in sources])
        own, _ = self._readable(sources, texts, subwords, direction)
        symbols = np.array(self._symbols(direction, tag), dtype=np.int32)
        read = {pair: np.concatenate([symbols, ids]) for pair, ids in own.items()}
        lengths = [len(target) + 1 for target in targets]
        begins = np.cumsum([0, *lengths])
        rows_N = np.zeros(begins[-1], dtype=teacher_dtype(ids_dtype(subwords.size)))
        held_out = HeldOut([*read.values()], [targets[pair] for pair in read], [])
        found = best_subwords(self.translator.models, held_out, TEACHER_BEST, self.options.experts_per_token)
        for pair, best in zip(read, found, strict=True):
            here = slice(begins[pair], begins[pair + 1])
            rows_N["ids"][here], rows_N["probabilities"][here] = best
        return rows_N

    def _symbols(self, direction: Direction, tag: str) -> tuple[int, ...]:
        """Return the symbols of the target language and of the tag, which the teacher reads before each source."""
        assert self.translator.directions
        tag = tag if tag in self.translator.directions.symbols.tags else ""
        return self.translator.directions.prefix(self.translator.subwords, direction, tag)

    def _readable(
        self, sources: Sequence[np.ndarray], texts: Sequence[str], subwords: Subwords, direction: Direction
    ) -> tuple[dict[int, np.ndarray], Counter[str]]:
        """Return (the teacher's ids of the pairs that it can translate, how many others there are and why)."""
        same = subwords.fingerprint == self.translator.subwords.fingerprint
        normalise = self.translator.normalisers(replace(self.options, direction=direction))[0]
        same &= normalise is str
        own = sources if same else self.translator.subwords.encode_batch([normalise(text) for text in texts])
        symbols = np.array([each for kind in RESERVED for each in subwords.reserved_ids(kind)])
        most, kept, readable = self.translator.max_pieces(), Counter[str](), {}
        for pair, ids in enumerate(own):
            if np.isin(sources[pair], symbols).any():
                kept["symbols"] += 1
            elif 0 < len(ids) <= most:
                readable[pair] = ids
            else:
                kept["length"] += 1
        return readable, kept

    def _search(
        self,
        sources: Mapping[int, np.ndarray],
        symbols: Sequence[int],
        texts: Sequence[str],
        progress: Callable[[float], None] | None,
    ) -> dict[int, list[Hypothesis]]:
        """Return the hypotheses of each pair, as `nmt translate` finds them: trouble is searched again."""
        search = partial(self.translator.searcher.search, symbols=symbols)
        found = dict(zip(sources, search([*sources.values()], self.options, progress), strict=True))
        search_again(
            found,
            self.options,
            texts,
            self.translator.subwords.decode_batch,
            lambda pairs, options: dict(zip(pairs, search([sources[pair] for pair in pairs], options), strict=True)),
        )
        return found

    def _good(
        self, found: Mapping[int, list[Hypothesis]], texts: Sequence[str]
    ) -> tuple[dict[int, list[str]], Counter[str]]:
        """Return (the texts of the hypotheses that may be targets, best first; how many pairs have none, and why)."""
        decode = self.translator.subwords.decode_batch
        flat = [(pair, each) for pair, ranked in found.items() for each in ranked]
        bad = troubles(
            [texts[pair] for pair, _ in flat], {place: [each] for place, (_, each) in enumerate(flat)}, decode
        )
        good: dict[int, list[str]] = {}
        ended = set()
        for place, text in enumerate(decode([each.tokens for _, each in flat])):
            pair, hypothesis = flat[place]
            if hypothesis.finished:
                ended.add(pair)
                if place not in bad and text.strip():
                    good.setdefault(pair, []).append(text)
        return good, Counter("trouble" if pair in ended else "cut" for pair in found if pair not in good)
