"""The directions that a run translates, and which of them is meant.

A direction that the run was not trained on is possible if its target language has a symbol: a zero-shot direction
(Johnson et al. 2017, section 4.5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nmt.config import Config, Direction
from nmt.data.subwords import Subwords
from nmt.data.symbols import Symbols
from nmt.errors import DataError, UserError

Each = TypeVar("Each", bound=Direction | None)


@dataclass(frozen=True)
class Directions:
    """What a run translates."""

    name: str
    """Name of the run, for messages."""
    trained: tuple[Direction, ...]
    """The directions that it was trained on, at least one."""
    symbols: Symbols = field(default_factory=Symbols)
    """Meanings of its reserved symbols."""
    punctuation: str = "keep"
    """How its training text was normalised, and so what it reads: `corpus.punctuation`."""

    @classmethod
    def of(cls, config: Config, record: Mapping[str, Any], name: str, where: str) -> "Directions":
        """Return the directions of the run `name` with these settings, whose corpus.json or manifest is `record`.

        A run on several corpora has the directions of all of them, its own first. DataError, which names the file by
        `where`, if its symbols or directions are damaged.
        """
        mixed = record.get("mixed_directions", [])
        if not isinstance(mixed, list) or not all(isinstance(each, str) for each in mixed):
            raise DataError(f"{where} is damaged: mixed_directions={mixed!r} is not a list of directions")
        try:
            trained = dict.fromkeys([*config.corpus.all_directions(), *map(Direction.of, mixed)])
        except ValueError as error:
            raise DataError(f"{where} is damaged: {error}") from error
        return cls(name, tuple(trained), Symbols.of(record, where), config.corpus.punctuation)

    @property
    def languages(self) -> set[str]:
        """All languages that the run knows, on either side."""
        return {language for direction in self.trained for language in direction} | {*self.symbols.languages}

    @property
    def are_several(self) -> bool:
        """Whether a user can choose among directions."""
        return len(self.trained) > 1 or bool(self.symbols.languages)

    def is_zero_shot(self, direction: Direction) -> bool:
        """Return whether the run was not trained on a direction."""
        return direction not in self.trained

    def check(self, direction: Direction) -> Direction:
        """Return a direction that the run translates. UserError, which lists what it has, for any other."""
        source, target = direction
        possible = target in self.symbols.languages and source in self.languages and source != target
        if self.is_zero_shot(direction) and not possible:
            raise UserError(f"{self.name} does not translate {direction}; it has: {_listed(self.trained)}")
        return direction

    def prefix(self, subwords: Subwords, direction: Direction, tag: str = "") -> tuple[int, ...]:
        """Return the ids before each source in a direction: the symbols of its target language and of the tag.

        UserError as for `check`. DataError for a tag that has no symbol.
        """
        return self.symbols.prefix(subwords, self.check(direction).target, tag)

    def only(self, how: str) -> Direction:
        """Return the only direction of the run. UserError, with `how` to choose one, if it has several."""
        if len(self.trained) > 1:
            raise UserError(
                f"{self.name} translates {len(self.trained)} directions: {how}; it has: {_listed(self.trained)}"
            )
        return self.trained[0]

    def choose(self, source: str | None, target: str | None) -> Direction:
        """Return the direction from --from `source` and --to `target`; None: not given.

        One of them may be left out if a single direction fits, both if the run has a single one. UserError, which lists
        what the run has, if no direction fits or several do.
        """
        if source is None and target is None:
            return self.only("give --from and --to")
        if source is not None and target is not None:
            return self.check(Direction(source, target))
        fitting = [each for each in self.trained if source in (None, each.source) and target in (None, each.target)]
        if len(fitting) == 1:
            return fitting[0]
        given, lacking = (f"to {target}", "--from") if source is None else (f"from {source}", "--to")
        if fitting:
            raise UserError(f"{self.name} translates {_listed(fitting)}: give {lacking}, too")
        raise UserError(f"{self.name} does not translate {given}; it has: {_listed(self.trained)}")


def places_by_direction(directions: Sequence[Each]) -> dict[Each, list[int]]:
    """Return the places of the pairs of each direction, given that of every pair; first directions come first."""
    found: dict[Each, list[int]] = {}
    for place, direction in enumerate(directions):
        found.setdefault(direction, []).append(place)
    return found


def _listed(directions: Sequence[Direction]) -> str:
    return ", ".join(map(str, directions))
