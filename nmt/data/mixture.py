"""What an epoch consists of: the corpora of a run, and how often each of their pairs is drawn.

A corpus has the share of its weight in an epoch. Within a corpus, a part (a direction and a tag) of n pairs has a share
in proportion to n^(1/T) (temperature T, Arivazhagan et al. 2019). An epoch has as many pairs as all parts together.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import CorpusConfig, Direction, TrainingConfig
from nmt.data.batching import EpochText
from nmt.data.prepared import FACTS, VOCABULARY, Part, Prepared, find_prepared
from nmt.data.shards import DTYPES, has_teacher, positions, teacher_dtype
from nmt.data.symbols import Symbols
from nmt.errors import DataError, UserError


def mixed_in(corpus: CorpusConfig) -> list[Prepared]:
    """Return the corpora of `corpus.mixture`, in its order. DataError if one is not prepared, or damaged."""
    found = []
    for reference in corpus.mixture:
        try:
            found.append(find_prepared(reference))
        except DataError as error:
            raise DataError(f"corpus.mixture.{reference}: {error}") from error
    return found


class Corpora:
    """The prepared corpora that a run is trained on: its own, then those of `corpus.mixture` in their order."""

    def __init__(self, corpus: CorpusConfig, prepared: Prepared) -> None:
        """Take `prepared`, which is that of `corpus`, and find the others.

        DataError if one is not prepared or named twice, or if it has another vocabulary, other punctuation, or other
        meanings of its reserved symbols. The same if it has another target language, and no symbol shows the model
        which one is wanted.
        """
        self._corpus = corpus
        self.own = prepared
        """The corpus of the run itself, which has its dev and test text."""
        self._all = [prepared, *mixed_in(corpus)]
        for place, other in enumerate(self._all[1:], start=1):
            _check_same_text(prepared, other)
            if other.path.resolve() in [each.path.resolve() for each in self._all[:place]]:
                raise DataError(
                    f"corpus.mixture: {other.path} is there twice, or is the corpus of the run itself: name each "
                    "corpus once, and give it a larger weight if more of it is wanted"
                )
        self.symbols = _common_symbols(self._all)
        """The meanings of the reserved symbols in all corpora."""
        if not self.symbols.languages:
            _check_target(self._all)
        for direction in self._mixed_directions():
            _check_codes(direction)

    def verify(self) -> None:
        """Compare every file of the other corpora with its manifest, unless that was done before.

        DataError for the first that differs. `prepare` has verified the run's own corpus.
        """
        for prepared in self._all[1:]:
            if not prepared.is_verified:
                prepared.verify()

    def record(self) -> dict[str, Any]:
        """Return the facts about the text that a run keeps: those of its own corpus, with counts of all corpora."""
        manifests = [prepared.manifest for prepared in self._all]
        record: dict[str, Any] = {"name": self._corpus.name, "fingerprint": self.own.fingerprint}
        record |= {name: sum(manifest[name] for manifest in manifests) for name, kind in FACTS.items() if kind is int}
        record["vocabulary_size"] = self.own.manifest["vocabulary_size"]
        dropped: Counter[str] = Counter()
        for manifest in manifests:
            dropped.update(manifest["dropped"])
        record["dropped"] = dict(dropped)
        if all("longest_source_pieces" in manifest for manifest in manifests):  # older preparations have none
            record["longest_source_pieces"] = max(manifest["longest_source_pieces"] for manifest in manifests)
        record["symbols"] = [*dict.fromkeys(chain.from_iterable(each.get("symbols", []) for each in manifests))]
        record |= self.symbols.to_dict()
        if self._corpus.mixture:
            record["mixture"] = [prepared.fingerprint for prepared in self._all[1:]]
            record["mixed_directions"] = list(map(str, self._mixed_directions()))
        return record

    def directions(self, split: str) -> list[Direction]:
        """Return the direction of each pair of "dev" or "test"; empty if the run has a single one.

        Errors as for `Prepared.directions`.
        """
        found = self.own.directions(split)
        if found or not self._mixed_directions():
            return found
        return [self._corpus.direction] * len(self.own.text(split)[0])

    def _mixed_directions(self) -> list[Direction]:
        """Return the directions that only the other corpora have."""
        directions = chain.from_iterable(prepared.trained_directions() for prepared in self._all[1:])
        return [each for each in dict.fromkeys(directions) if each not in self._corpus.all_directions()]

    def check_training(self, training: TrainingConfig) -> None:
        """Raise UserError if a corpus has a teacher's probabilities, and `training` cannot use them."""
        for prepared in self._all:
            if any(map(has_teacher, prepared.manifest["shards"].values())):
                check_teacher(f"{prepared.path} has a teacher's probabilities", self._corpus, training)

    def mixture(self, seed: int) -> "Mixture":
        """Map the training pairs of all corpora. DataError if their files do not fit the manifests."""
        parts: list[Part] = []
        shares: list[float] = []
        weights = [self._corpus.weight, *self._corpus.mixture.values()]
        names = [self._corpus.name, *(Path(reference).resolve().name for reference in self._corpus.mixture)]
        for name, prepared, weight in zip(names, self._all, weights, strict=True):
            found = prepared.parts()
            sizes = [len(part.shards) for part in found]
            shares += [weight * share for share in tempered(sizes, self._corpus.temperature)]
            several = len(found) > 1
            parts += [part._replace(name=f"{name} {part.name}" if several else name) for part in found]
        return Mixture(parts, shares, seed)


def check_teacher(reason: str, corpus: CorpusConfig, training: TrainingConfig) -> None:
    """Raise UserError if a student with these settings cannot learn from a teacher's probabilities.

    Other subwords than the teacher's have none, and R-Drop has another loss. `reason`: why probabilities are there.
    """
    for key, value in (("corpus.subwords.sampling", corpus.subwords.sampling), ("training.r_drop", training.r_drop)):
        if value and training.teacher_weight:
            raise UserError(
                f"{reason}, which {key}={value} cannot use: set {key}=0, or training.teacher_weight=0 to leave them out"
            )


def tempered(sizes: Sequence[int], temperature: float) -> list[float]:
    """Return the shares of parts of n pairs, n^(1/T) / sum of n^(1/T) (Arivazhagan et al. 2019)."""
    powers = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)
    shares: list[float] = (powers / powers.sum()).tolist()
    return shares


class Mixture:
    """Training text drawn from parts by their shares (`nmt.data.batching.TrainingText`).

    The pairs of a part come from an endless sequence of its permutations, n_p of them per epoch. So each pair is seen
    as often as any other of its part, give or take one, and any epoch is computed from its number alone. n_p is the
    share of the part in the number of all pairs, rounded so that the sum is exact (by largest remainders).

    A single part without symbols before its sources is used as it is.
    """

    def __init__(self, parts: Sequence[Part], shares: Sequence[float], seed: int) -> None:
        """Mix `parts` by `shares`, which need not sum to 1. DataError if an epoch would have no pair of a part."""
        self._parts, self._seed = parts, seed
        self.num_pairs = sum(len(part.shards) for part in parts)
        """Pairs of an epoch, and of all parts together."""
        self.counts = _rounded(shares, self.num_pairs)
        """Pairs of each part in an epoch: n_p."""
        for part, count in zip(parts, self.counts, strict=True):
            if not count and len(part.shards):
                raise DataError(
                    f"{part.name} has so low a weight that none of its pairs are among the {self.num_pairs:,} of an "
                    "epoch: raise it in corpus.mixture or corpus.weight"
                )

    @property
    def notes(self) -> list[str]:
        """A line about the parts, their pairs and their shares of an epoch; none for a single part."""
        shown = [
            f"{part.name} {len(part.shards):,} ({100 * count / self.num_pairs:.3g} %)"
            for part, count in zip(self._parts, self.counts, strict=True)
        ]
        return [f"pairs, and their share of an epoch: {', '.join(shown)}"] if len(shown) > 1 else []

    def epoch(self, number: int) -> EpochText:
        """Return the pairs of an epoch, part by part, each in the order of its files."""
        if len(self._parts) == 1 and not self._parts[0].prefix:
            return self._parts[0].shards
        drawn = [
            _drawn(len(part.shards), count, number, (self._seed, place))
            for place, (part, count) in enumerate(zip(self._parts, self.counts, strict=True))
        ]
        return _Drawn(self._parts, drawn)


class _Drawn:
    """The pairs of one epoch (`EpochText`): those of the first part, then those of the second, and so on."""

    def __init__(self, parts: Sequence[Part], drawn: Sequence[np.ndarray]) -> None:
        """Take for each part the numbers of the pairs drawn from it."""
        self._parts, self._drawn = parts, drawn
        self._ends = np.cumsum([len(pairs) for pairs in drawn])
        self.source_lengths, self.target_lengths = (
            np.concatenate(lengths)
            for lengths in zip(
                *(
                    (part.shards.source_lengths[pairs] + len(part.prefix), part.shards.target_lengths[pairs])
                    for part, pairs in zip(parts, drawn, strict=True)
                ),
                strict=True,
            )
        )

    def gather(self, side: str, pairs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (concatenated subword ids of these pairs, their lengths), int64, with the symbols before a source."""
        lengths_B = (self.source_lengths if side == "source" else self.target_lengths)[pairs_B].astype(np.int64)
        first_B = np.cumsum(lengths_B) - lengths_B
        ids_N = np.empty(lengths_B.sum(), dtype=np.int64)
        part_B = np.searchsorted(self._ends, pairs_B, side="right")
        for number in np.unique(part_B):
            here_B = part_B == number
            part, drawn = self._parts[number], self._drawn[number]
            prefix = part.prefix if side == "source" else ()
            pairs = drawn[pairs_B[here_B] - (self._ends[number] - len(drawn))]
            ids, lengths = part.shards.gather(side, pairs)
            ids_N[first_B[here_B][:, None] + np.arange(len(prefix))] = prefix
            ids_N[positions(first_B[here_B] + len(prefix), lengths)] = ids
        return ids_N, lengths_B

    def teacher(self, pairs_B: np.ndarray) -> np.ndarray | None:
        """Return the teacher's rows of the target positions of these pairs, zeros where a part has none."""
        if not any(part.shards.has_teacher for part in self._parts):
            return None
        lengths_B = self.target_lengths[pairs_B].astype(np.int64) + 1
        first_B = np.cumsum(lengths_B) - lengths_B
        rows_N = np.zeros(lengths_B.sum(), dtype=teacher_dtype(DTYPES[-1]))
        part_B = np.searchsorted(self._ends, pairs_B, side="right")
        for number in np.unique(part_B):
            here_B = part_B == number
            drawn = self._drawn[number]
            found = self._parts[number].shards.teacher(drawn[pairs_B[here_B] - (self._ends[number] - len(drawn))])
            if found is not None:
                rows_N[positions(first_B[here_B], lengths_B[here_B])] = found
        return rows_N


def _drawn(num_pairs: int, count: int, epoch: int, seed: tuple[int, int]) -> np.ndarray:
    """Return the pairs at the positions epoch * count .. (epoch + 1) * count of a part's endless sequence, sorted.

    The sequence is one permutation of the pairs after the other. Number j depends on `seed` and j alone.
    """
    first, last = epoch * count, (epoch + 1) * count
    passes = sorted({first // num_pairs, (last - 1) // num_pairs}) if count else []
    # The passes between the first and the last are whole.
    times = np.full(num_pairs, max(0, passes[-1] - passes[0] - 1) if passes else 0, dtype=np.int32)
    for number in passes:
        start, end = max(first - number * num_pairs, 0), min(last - number * num_pairs, num_pairs)
        if end - start == num_pairs:
            times += 1
        else:
            entropy = np.random.SeedSequence(seed[0], spawn_key=(seed[1], number))
            order = np.random.default_rng(entropy).permutation(np.arange(num_pairs, dtype=np.int32))
            times[order[start:end]] += 1
    return np.repeat(np.arange(num_pairs, dtype=np.int32), times)


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to `shares` that sum to `total`, each rounded down or up.

    Those with the largest remainders are rounded up; of equal ones, the first.
    """
    exact = np.asarray(shares, dtype=np.float64) * (total / sum(shares))
    counts = np.floor(exact).astype(np.int64)
    raised = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[raised] += 1
    rounded: list[int] = counts.tolist()
    return rounded


def _check_same_text(own: Prepared, other: Prepared) -> None:
    """Raise DataError unless two corpora have the same vocabulary, and punctuation normalised in the same way."""
    if own.manifest["files"][VOCABULARY]["sha256"] != other.manifest["files"][VOCABULARY]["sha256"]:
        raise DataError(
            f"corpus.mixture: {other.path} has another vocabulary than {own.path}: prepare this corpus with the "
            f"vocabulary of the other, corpus.subwords.vocabulary={other.path}"
        )
    ours, theirs = (each.manifest["corpus"].get("punctuation", "keep") for each in (own, other))
    if ours != theirs:
        raise DataError(
            f"corpus.mixture: {other.path} has corpus.punctuation={theirs}, but {own.path} has {ours}: prepare both "
            "with the same"
        )


def _common_symbols(corpora: Sequence[Prepared]) -> Symbols:
    """Return the longest tables of meanings. DataError if a symbol means different things in two corpora."""
    longest = corpora[0].symbols
    for other in corpora[1:]:
        tables = []
        for kind in ("languages", "tags"):
            ours, theirs = getattr(longest, kind), getattr(other.symbols, kind)
            differ = ours[: len(theirs)] != theirs[: len(ours)]
            # A corpus without languages has no symbols of languages before its sources.
            if differ or (kind == "languages" and bool(ours) != bool(theirs)):
                raise DataError(
                    f"corpus.mixture: {other.path} has the {kind} {_listed(theirs)} where {corpora[0].path} has "
                    f"{_listed(ours)}: prepare this corpus with corpus.subwords.vocabulary={other.path}, which keeps "
                    "the meanings of symbols"
                )
            tables.append(max(ours, theirs, key=len))
        longest = Symbols(*tables)
    return longest


def _check_target(corpora: Sequence[Prepared]) -> None:
    """Raise DataError unless all corpora have the same target language."""
    targets = [prepared.trained_directions()[0].target for prepared in corpora]
    for other, target in zip(corpora, targets, strict=True):
        if target != targets[0]:
            raise DataError(
                f"corpus.mixture: {other.path} has the target language {target}, but {corpora[0].path} {targets[0]}, "
                "and neither has symbols that show a model which one is wanted: prepare both with corpus.directions"
            )


def _check_codes(direction: Direction) -> None:
    """Raise DataError if the text of a direction, which a run keeps, does not show where one code ends."""
    try:
        Direction.of(str(direction))
    except ValueError as error:
        raise DataError(
            f"corpus.mixture: a corpus from {direction.source!r} to {direction.target!r} cannot be mixed into one in "
            "other languages: prepare it with language codes without hyphens, such as pt_BR"
        ) from error


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"
