"""Which language or tag each reserved symbol of a corpus means, and the symbols before a source sentence.

A model of several directions learns the target language from a symbol before the source (Johnson et al. 2017). A tag
shows the domain or origin of a pair, such as "bt" for back-translated text (Caswell et al. 2019).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nmt.data.subwords import RESERVED, Subwords
from nmt.errors import DataError


@dataclass(frozen=True)
class Symbols:
    """The meanings, by number: `languages[n]` is the target language of "<language:n>", `tags[n]` that of "<tag:n>".

    Text in two languages has no languages here: its sources have no symbol of the target language.
    """

    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> "Symbols":
        """Return the meanings in a manifest or corpus.json; none if it is older. DataError, which names `where`."""
        found = {}
        for kind, key in (("language", "languages"), ("tag", "tags")):
            names = record.get(key, [])
            if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
                raise DataError(f"{where} is damaged: {key}={names!r} is not a list of names")
            if len(set(names)) < len(names) or len(names) > RESERVED[kind]:
                raise DataError(f"{where} is damaged: {key}={names!r} has a name twice or more than {RESERVED[kind]}")
            found[key] = tuple(names)
        return cls(**found)

    def to_dict(self) -> dict[str, list[str]]:
        """Return what `of` reads."""
        return {"languages": list(self.languages), "tags": list(self.tags)}

    def extended(self, languages: Iterable[str], tags: Iterable[str]) -> "Symbols":
        """Return these meanings and, after them, those of new names. DataError if there are more than symbols."""
        extended = {
            "language": tuple(dict.fromkeys((*self.languages, *languages))),
            "tag": tuple(dict.fromkeys((*self.tags, *tags))),
        }
        for kind, names in extended.items():
            if len(names) > RESERVED[kind]:
                raise DataError(
                    f"the vocabulary has symbols for {RESERVED[kind]} {kind}s, but with those it has already there are "
                    f"{len(names)} ({_listed(names)}): use fewer, or corpus.subwords.vocabulary=learn"
                )
        return Symbols(extended["language"], extended["tag"])

    def prefix(self, subwords: Subwords, target_language: str = "", tag: str = "") -> tuple[int, ...]:
        """Return the ids before a source: the symbol of the target language, if the corpus has several, then the tag.

        DataError for a language or a tag that has no symbol here, and if the vocabulary is older than symbols.
        """
        wanted = [("language", self.languages, target_language if self.languages else ""), ("tag", self.tags, tag)]
        ids = []
        for kind, names, name in wanted:
            if not name:
                continue
            if name not in names:
                raise DataError(f"{name} is none of the {kind}s that the text was prepared with: {_listed(names)}")
            reserved = subwords.reserved_ids(kind)
            if not reserved:
                raise DataError(f"the vocabulary is older than symbols of {kind}s: prepare the corpus with a new one")
            ids.append(reserved[names.index(name)])
        return tuple(ids)

    def fits(self, other: "Symbols") -> bool:
        """Return whether no symbol has different meanings in two tables. One of them may have more names, or all."""
        pairs = (self.languages, other.languages), (self.tags, other.tags)
        return all(mine[: len(theirs)] == theirs[: len(mine)] for mine, theirs in pairs)

    def agrees_with(self, other: "Symbols") -> bool:
        """Return whether models with these tables can read the same sources: `fits`, and both or none have languages.

        Only models with languages read a symbol before sources.
        """
        return self.fits(other) and bool(self.languages) == bool(other.languages)

    def shown(self, subwords: Subwords) -> dict[int, str]:
        """Return what a reader sees for each symbol, by its id: "⟨to fr⟩" for a target language, "⟨bt⟩" for a tag."""
        languages = zip(subwords.reserved_ids("language"), self.languages, strict=False)
        tags = zip(subwords.reserved_ids("tag"), self.tags, strict=False)
        return {symbol: f"⟨to {name}⟩" for symbol, name in languages} | {symbol: f"⟨{name}⟩" for symbol, name in tags}


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
