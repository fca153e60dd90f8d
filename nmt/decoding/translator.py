"""Translation of lines of text by a trained model: one translation per line, in order.

A line is returned unchanged if it has no letters or digits that are in the vocabulary. A line that is too long is
translated in parts (nmt/text/segment.py). A translation has a line break only with `paragraphs`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import torch

from nmt.config import Config, DecodingConfig, Direction
from nmt.data.examples import Annotated, annotated
from nmt.data.subwords import Subwords, one_line
from nmt.data.symbols import Symbols
from nmt.decoding.directions import Directions
from nmt.decoding.keeping import Protected, gather, protect, spread, with_alignments
from nmt.decoding.loading import (
    check_punctuation,
    check_symbols,
    known_symbols,
    load_model,
    load_others,
    longest_source,
    prepared,
)
from nmt.decoding.normalising import Pairs, between_blanks, has_words, lines_as_read, tables_as_read
from nmt.decoding.parts import Part, Rank, Reading, joined
from nmt.decoding.retry import Hypotheses, search_again
from nmt.decoding.searcher import Searcher
from nmt.decoding.terms import Attention, Placed, place_terms, terms_of_parts
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options, Translation
from nmt.device import pick_device, search_dtype, set_float32_products
from nmt.errors import UserError
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import types_in_place
from nmt.run import RunDirectory
from nmt.text.checks import Flag
from nmt.text.markup import SLOTS
from nmt.text.punctuation import Normalise, normaliser
from nmt.text.segment import split
from nmt.text.terms import Match, Terms

_MOST_SHOWN = 60
_SLOT = re.compile(f"([{SLOTS}])")
_NOTHING = np.zeros(0, dtype=np.int32)


class Found(NamedTuple):
    """What the search found for a reading."""

    hypotheses: Hypotheses
    """Those of the parts that have something to translate."""
    retried: dict[int, str]
    """Details of flags of the parts that were searched again, by the number of the part."""


class Translator:
    """A model, its vocabulary and the options of the search. Nothing here changes, so several threads may share it.

    The model is used in the precision of `decoding.precision` and `decoding.quantize`. Each but fp32 has its own copy
    of weights, made once (`WorkingWeights`).
    """

    def __init__(
        self,
        model: Seq2Seq,
        subwords: Subwords,
        decoding: DecodingConfig,
        device: torch.device,
        longest_seen: int = 0,
        steps: Sequence[int] = (),
        symbols: Collection[str] = (),
        directions: Directions | None = None,
        others: Sequence[Seq2Seq] = (),
    ) -> None:
        """Prepare a trained model for translation.

        `longest_seen` is `longest_source` of its run; 0 if unknown. `steps` are the training steps whose parameters, or
        mean of parameters, the model has; empty if unknown. `symbols` is `known_symbols` of its run. `directions` are
        those of its run; None: a single one, between unknown languages. `others` are models that translate with this
        one as an ensemble. ValueError if `decoding` is not possible with the models.
        """
        self.models = [prepared(each, device, decoding) for each in (model, *others)]
        """All models of the ensemble, or the one model."""
        self.model = self.models[0]
        """The first model, which has the run's experts."""
        self.searcher = Searcher(self.models, device, subwords.forbidden_ids, subwords.reserved_ids("slot"))
        self.subwords = subwords
        self.options = Options.of(decoding)
        """Default options of a call."""
        self.device = device
        self.longest_seen = longest_seen
        self.steps = list(steps)
        self.directions = directions
        self.symbols = frozenset(symbols)
        """Kinds of reserved symbols that the model has learned: "slot", "term"."""
        self._slot_of: dict[str, int] = {}
        if "slot" in self.symbols:
            self._slot_of = dict(zip(SLOTS, subwords.reserved_ids("slot"), strict=False))

    @classmethod
    def load(cls, run: RunDirectory, config: Config) -> "Translator":
        """Return the translator of a run, with the checkpoint of `config.decoding`, or of an exported model.

        CheckpointError as for `load_model`, `load_others`, `check_symbols` and `check_punctuation`.
        """
        device = pick_device(config.decoding.device, "decoding.device")
        set_float32_products(device, config.decoding.precision)
        # What a GPU or another precision needs a copy of is read at once.
        in_place = () if device.type != "cpu" else types_in_place(search_dtype(device, config.decoding))
        loaded = load_model(run, config, in_place)
        others = [each.model for each in load_others(loaded.subwords, config.decoding, in_place)]
        corpus = run.corpus_info()
        longest, symbols = longest_source(corpus, config), known_symbols(corpus)
        directions = Directions.of(config, corpus, run.path.name, str(run.corpus_path))
        check_symbols(directions.symbols, config.decoding)
        check_punctuation(directions.punctuation, config.decoding)
        return cls(
            loaded.model,
            loaded.subwords,
            config.decoding,
            device,
            longest,
            loaded.steps,
            symbols,
            directions,
            others,
        )

    def language(self, options: Options | None = None) -> str:
        """Return the language of the sources of a call; empty if it is unknown. UserError as for `source_symbols`."""
        direction = self._direction(options or self.options)
        return direction.source if direction else ""

    def source_symbols(self, options: Options | None = None) -> tuple[int, ...]:
        """Return the ids that the model reads before each source: symbols of the target language and of the tag.

        UserError for a direction that the model does not have, and for none if it has several. DataError for a tag that
        it has no symbol of.
        """
        options = options or self.options
        direction, known = self._direction(options), self.directions.symbols if self.directions else Symbols()
        return known.prefix(self.subwords, direction.target if direction else "", options.tag)

    def normalisers(self, options: Options | None = None) -> tuple[Normalise, Normalise]:
        """Return what makes of a source and of a target what the model has learned (`corpus.punctuation`).

        UserError as for `source_symbols`.
        """
        direction = self._direction(options or self.options)
        if direction is None or self.directions is None:
            return str, str
        source, target = (normaliser(self.directions.punctuation, language) for language in direction)
        return source, target

    def as_read(self, lines: Sequence[str], options: Options | None = None, begun: Collection[int] = ()) -> list[str]:
        """Return lines as the model reads them. Those whose numbers are in `begun` have a prefix.

        UserError as for `source_symbols`.
        """
        options = options or self.options
        return lines_as_read(lines, self.normalisers(options)[0], self.subwords, options.markup, begun)

    def pairs(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        options: Options | None = None,
        directions: Sequence[Direction | None] = (),
    ) -> Pairs:
        """Return sentence pairs as the model reads them, to be scored.

        `directions` has that of each pair; empty: all have that of `options`. UserError as for `source_symbols`.
        """
        options = options or self.options
        each_of = [*directions] or [options.direction] * len(sources)
        chosen = {direction: replace(options, direction=direction) for direction in dict.fromkeys(each_of)}
        symbols = {direction: self.source_symbols(each) for direction, each in chosen.items()}
        sides = {direction: self.normalisers(each) for direction, each in chosen.items()}
        texts = [
            [sides[direction][side](text) for direction, text in zip(each_of, lines, strict=True)]
            for side, lines in enumerate((sources, targets))
        ]
        return Pairs(texts[0], texts[1], [symbols[direction] for direction in each_of])

    def _direction(self, options: Options) -> Direction | None:
        """Return the direction of a call; None if the model has a single one, between unknown languages."""
        if not self.directions:
            return options.direction
        return self.directions.check(options.direction) if options.direction else self.directions.only("name one")

    def shown_symbols(self) -> dict[int, str]:
        """Return what a reader sees for the symbols before sources, by their ids (`Symbols.shown`)."""
        return self.directions.symbols.shown(self.subwords) if self.directions else {}

    def max_pieces(self, options: Options | None = None) -> int:
        """Return the most subwords that are translated as a whole; no more than the longest training line has.

        Symbols of the direction and tag do not count.
        """
        limit = (options or self.options).max_source_pieces
        return min(limit, self.longest_seen) if self.longest_seen else limit

    def translate(
        self,
        lines: Sequence[str],
        options: Options | None = None,
        *,
        long: Collection[int] = (),
        prefixes: Mapping[int, str] | None = None,
        terms: Sequence[Sequence[Terms]] = (),
        rank: Rank | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[Translation]:
        """Return the translation of each line, in order: `read`, `find` and `write` in turn.

        `options`: None for `self.options`. `prefixes`, `terms` and errors are as for `read`, `rank` as for `write`.
        `progress` is called after each batch with the fraction of the work that is done. CheckpointError if the
        model's outputs are not finite. MemoryLimitError. ValueError for options that the model does not allow.
        """
        reading = self.read(lines, options, long, prefixes, terms)
        return self.write(reading, self.find(reading, progress), rank)

    def read(
        self,
        lines: Sequence[str],
        options: Options | None = None,
        long: Collection[int] = (),
        prefixes: Mapping[int, str] | None = None,
        terms: Sequence[Sequence[Terms]] = (),
    ) -> Reading:
        """Return lines ready to be searched. This is the host's work before a search.

        Any text counts as a line. Lines of more than `max_pieces` subwords are translated in parts, all lines with
        `paragraphs`. So are the lines whose indices are in `long`: each is a piece of a longer line. `prefixes` has the
        texts that translations begin with, by the index of the line: its tags and fields are translated like text.
        `terms` has the tables of terms of each line, the most important one first; empty for none. UserError for a
        prefix that cannot be kept exactly. Errors for directions and tags are those of `source_symbols`.
        """
        options = options or self.options
        symbols, language = self.source_symbols(options), self.language(options)
        read = self.as_read(lines, options, prefixes or {})
        given = {place: old for place, (old, new) in enumerate(zip(lines, read, strict=True)) if old != new}
        terms = tables_as_read(terms, *self.normalisers(options))
        kept = self._kept(read, prefixes or {}, options.paragraphs) if options.markup else {}
        lines, origin = spread(read, kept)
        long = {place for place, line in enumerate(origin) if line in long}
        terms = [terms[line] for line in origin] if terms else terms
        place_of = {line: place for place, line in enumerate(origin)}
        prefixes = {place_of[line]: text for line, text in (prefixes or {}).items()}
        most = self.max_pieces(options)
        encoded: dict[str, np.ndarray] = {}

        def fits(some: Sequence[str]) -> list[bool]:
            # All parts pass through here, so that no text is encoded twice.
            ids = self.subwords.encode_parts([self._slotted(text) for text in some])
            encoded.update(zip(some, ids, strict=True))
            return [len(each) <= most for each in ids]

        # A line without words is returned unchanged, even if it is long.
        parts = [
            [line]
            if place not in long and ((short and not options.paragraphs) or not has_words(line))
            else split(line, fits, language)
            for place, (line, short) in enumerate(zip(lines, fits(lines), strict=True))
        ]
        texts = [text for each in parts for text in each]
        unlearned = [self.subwords.unlearned(_SLOT.sub("", text)) if has_words(text) else "" for text in texts]
        wordy = [place for place, text in enumerate(texts) if has_words(text, unlearned[place])]
        matches, marked, marked_ids = self._terms(parts, terms, most)
        pieces = {place: marked_ids.get(place, encoded[texts[place]]) for place in wordy}
        sources = {place: ids for place, ids in pieces.items() if len(ids)}
        first = list(accumulate(map(len, parts), initial=0))
        begun = {first[line]: self.encode_prefix(text, options) for line, text in prefixes.items() if text}
        for place in begun.keys() - sources.keys():
            raise UserError(
                f"{_shown(texts[place])} has nothing to translate, so it cannot be translated with a prefix: leave the "
                "prefix out"
            )
        return Reading(
            options, symbols, parts, long, texts, unlearned, sources, begun, matches, marked, origin, kept, given
        )

    def encode_prefix(self, text: str, options: Options | None = None) -> np.ndarray:
        """Return the subword ids of a prefix. UserError if they do not decode to exactly this text.

        Its punctuation is that of the model's translations.
        """
        text = between_blanks(text, self.normalisers(options)[1])
        pieces = self.subwords.encode(text)
        kept = self.subwords.decode(pieces.tolist())
        if kept != text:
            raise UserError(
                f"prefix {_shown(text)} cannot be kept exactly: the subwords of the vocabulary make it {_shown(kept)}"
            )
        return pieces

    def find(self, reading: Reading, progress: Callable[[float], None] | None = None) -> Found:
        """Return what the search finds. This is the device's work. Errors are those of `translate`."""
        search = partial(self._search, reading)
        found = search(reading.sources, reading.options, progress)
        return Found(found, search_again(found, reading.options, reading.texts, self.subwords.decode_batch, search))

    def _search(
        self,
        reading: Reading,
        places: Collection[int],
        options: Options,
        progress: Callable[[float], None] | None = None,
    ) -> Hypotheses:
        """Return what the search finds for the parts of these numbers.

        Those that need no attention are searched by themselves: a few tags in a file do not slow all of it.
        """
        attended = reading.attended
        groups = [[place for place in places if (place in attended) == attention] for attention in (False, True)]
        found: Hypotheses = {}
        for attention, some in enumerate(groups):
            if not some:
                continue
            sources = [reading.sources[place] for place in some]
            prefixes = [reading.prefixes.get(place, _NOTHING) for place in some]
            told = progress and partial(_tell, progress, len(found), len(some), len(places))
            wanted = replace(options, attention=bool(attention))
            found |= zip(some, self.searcher.search(sources, wanted, told, prefixes, reading.symbols), strict=True)
        return {place: found[place] for place in places}

    def write(self, reading: Reading, found: Found, rank: Rank | None = None) -> list[Translation]:
        """Return the translation of each line. This is the host's work after a search.

        `rank` orders the hypotheses of a line; None: their scores do.
        """
        decoded = self._decoded(found.hypotheses)
        parts = iter([self._part(reading, found, place, decoded) for place in range(len(reading.texts))])
        whole = [
            joined(self.subwords, texts, list(islice(parts, len(texts))), line in reading.cut, reading.options, rank)
            for line, texts in enumerate(reading.parts)
        ]
        translations = gather(whole, reading.origin, reading.kept)
        if not reading.options.alignments:
            return translations
        return [with_alignments(each, reading.given.get(line)) for line, each in enumerate(translations)]

    def _decoded(self, found: Hypotheses) -> dict[int, list[str]]:
        """Return the texts of the hypotheses without attention, which need no places of subwords, decoded at once."""
        plain = {place: each for place, each in found.items() if each and each[0].attention_TS is None}
        texts = iter(self.subwords.decode_batch([each.tokens for ranked in plain.values() for each in ranked]))
        return {place: list(islice(texts, len(ranked))) for place, ranked in plain.items()}

    def _part(self, reading: Reading, found: Found, place: int, decoded: Mapping[int, list[str]]) -> Part:
        """Return the translation of part number `place`; a part without hypotheses keeps its text.

        `decoded` is what `_decoded` returns.
        """
        hypotheses = found.hypotheses.get(place, [])
        text, matches = reading.texts[place], reading.terms.get(place, [])
        if place in decoded:
            placed = [place_terms(each, matches, None) for each in decoded[place]]
        else:
            placed = [self._placed(reading, place, each) for each in hypotheses]
        return Part(
            reading.sources.get(place, _NOTHING),
            placed or [place_terms(one_line(text), matches, None)],
            hypotheses,
            reading.unlearned[place],
            [Flag("retried", found.retried[place])] if place in found.retried else [],
        )

    def _placed(self, reading: Reading, place: int, hypothesis: Hypothesis) -> Placed:
        """Return the text of a hypothesis, with its attention, for part number `place`, with its required terms."""
        source, marked = reading.texts[place], reading.marked.get(place)
        substitutes = {symbol: character for character, symbol in self._slot_of.items()}
        text, place_T = self.subwords.filled(hypothesis.tokens, substitutes | (marked.fills if marked else {}))
        if marked and marked.begins(text) and source.lstrip()[:1].isupper():
            text = text[:1].upper() + text[1:]
        place_S = marked.places(self.subwords) if marked else self._places(source)
        end = np.full(1, -1)
        assert hypothesis.attention_TS is not None
        attention = Attention(
            np.append(place_S, end),
            np.append(place_T, end) if hypothesis.finished else place_T,
            hypothesis.attention_TS,
        )
        return place_terms(text, reading.terms.get(place, []), attention)

    def _terms(
        self, parts: list[list[str]], tables: Sequence[Sequence[Terms]], most: int
    ) -> tuple[dict[int, list[Match]], dict[int, Annotated], dict[int, np.ndarray]]:
        """Return (terms, texts that mark them for a model that has learned it, subword ids of these) by part.

        A text that is longer than `most` subwords with its marks is read without them.
        """
        matches = terms_of_parts(parts, tables)
        if "term" not in self.symbols or not matches:
            return matches, {}, {}
        texts = [text for each in parts for text in each]
        # The first half of the slots is for placeholders.
        slots = self.subwords.reserved_ids("slot")
        slots = slots[len(slots) // 2 :]
        marked = {
            place: annotated(texts[place], found, slots, self.subwords)
            for place, found in matches.items()
            if not _SLOT.search(texts[place])
        }
        encoded = self.subwords.encode_parts([each.parts for each in marked.values()])
        short = {place: ids for place, ids in zip(marked, encoded, strict=True) if len(ids) <= most}
        return matches, {place: marked[place] for place in short}, short

    def _slotted(self, text: str) -> list[str | int]:
        """Return a text with the symbols of slots in place of their substitutes, for `Subwords.encode_parts`."""
        return [self._slot_of.get(part, part) for part in _SLOT.split(text)] if self._slot_of else [text]

    def _places(self, text: str) -> np.ndarray:
        """Return where each subword of a text begins, like `Subwords.places`, and each slot."""
        parts = self._slotted(text)
        if len(parts) == 1:
            return self.subwords.places(text)
        places = self.subwords.part_places(parts)
        places[places < 0] = [match.start() for match in _SLOT.finditer(text)]
        return places

    def _kept(self, lines: Sequence[str], prefixes: Mapping[int, str], keep_lines: bool) -> dict[int, Protected]:
        """Return the lines with tags or fields, by their numbers, except for those with a prefix."""
        found = {
            place: protect(line, bool(self._slot_of), keep_lines)
            for place, line in enumerate(lines)
            if not prefixes.get(place)
        }
        return {place: kept for place, kept in found.items() if kept}


def _tell(progress: Callable[[float], None], before: int, count: int, total: int, done: float) -> None:
    """Report the fraction of all parts that is done, given the fraction of `count` parts that follow those `before`."""
    progress((before + count * done) / total)


def _shown(text: str) -> str:
    """Return a text for a message: quoted, and cut if it is long."""
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...")
