"""What a preparation did, as numbers and examples: report/prepare.json in the prepared folder."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nmt.config import CorpusConfig
from nmt.corpus.rules import whys
from nmt.data.examples import KINDS
from nmt.data.prepared import prepared_path
from nmt.data.subwords import Subwords
from nmt.data.word_cache import WordEncoder
from nmt.preparation.filtered import FilteredText
from nmt.preparation.splits import HELD_OUT, Splits
from nmt.preparation.tally import Tally

REPORT = "report/prepare.json"
_FORMAT = 1
_MOST_CHARACTERS = 200
_CHANGES = {
    "punctuation": "with punctuation that Moses' rules change",
    "unicode": "with letters and marks that the vocabulary composes",
    "controls": "with control characters, which the vocabulary replaces with blanks",
}


def report(
    corpus: CorpusConfig,
    manifest: Mapping[str, Any],
    text: FilteredText,
    encoded: Tally,
    splits: Splits,
    subwords: Subwords,
    seconds: Mapping[str, float],
    processes: int,
) -> dict[str, Any]:
    """Return the report of a preparation, in the form of report/prepare.json."""
    every = Tally()
    every.add(text.tally)
    every.add(encoded, {"final": len(encoded.shown("final"))})
    return {
        "format": _FORMAT,
        "name": corpus.name,
        "languages": corpus.languages,
        "directions": [str(direction) for direction in corpus.all_directions()],
        "path": str(prepared_path(corpus)),
        "pairs_read": manifest["pairs_read"],
        "pairs_kept": manifest["pairs_kept"],
        "held_out": manifest["held_out"],
        "sources": [
            {"path": source.name, "pairs_read": source.num_read, "pairs_kept": source.num_kept}
            for source in text.sources
        ],
        "changes": list(_named(every, "changed", _CHANGES)),
        "rules": list(_named(every, "dropped", whys(corpus))),
        "augmented": [
            {"name": setting, "pairs": every.counts[f"augmented.{kind}"], "examples": every.shown(f"augmented.{kind}")}
            for kind, setting in KINDS.items()
            if getattr(corpus.examples, setting)
        ],
        "histograms": {
            "read": _histograms(every, "read", ("words.source", "words.target", "ratio")),
            "kept": _histograms(
                every, "kept", ("words.source", "words.target", "ratio", "pieces.source", "pieces.target")
            ),
        },
        "characters": {side: every.characters[side].most_common(_MOST_CHARACTERS) for side in ("source", "target")},
        "num_characters": {side: len(every.characters[side]) for side in ("source", "target")},
        "vocabulary": _vocabulary(corpus, manifest, every, splits, subwords),
        "overlap": {
            split: {
                "pairs": len(splits.texts(split)[0]),
                **{
                    f"kept_with_{side}": every.counts[f"overlap.{split}.{side}"]
                    for side in ("source", "target", "both")
                },
            }
            for split in HELD_OUT
            if splits.texts(split)[0]
        },
        "final_pairs": encoded.shown("final"),
        "seconds": {stage: round(each, 1) for stage, each in seconds.items()},
        "processes": processes,
    }


def _named(tally: Tally, group: str, why: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    for name, reason in why.items():
        key = f"{group}.{name}"
        yield {"name": name, "why": reason, "pairs": tally.counts[key], "examples": tally.shown(key)}


def _histograms(tally: Tally, group: str, names: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        what, _, side = name.partition(".")
        bins = tally.histograms[f"{group}.{name}"].tolist()
        if side:
            found.setdefault(what, {})[side] = bins
        else:
            found[what] = bins
    return found


def _vocabulary(
    corpus: CorpusConfig, manifest: Mapping[str, Any], tally: Tally, splits: Splits, subwords: Subwords
) -> dict[str, Any]:
    counts = tally.counts
    learned = list(subwords.learned()[0].values())
    in_bytes = tally.characters.get("in_bytes", Counter())
    return {
        "size": subwords.size,
        "kind": corpus.subwords.kind,
        "from": manifest.get("vocabulary", {}).get("from", ""),
        "subwords_per_word": counts["pieces"] / max(counts["words"], 1),
        "characters": counts["characters"],
        "characters_in_bytes": sum(in_bytes.values()),
        "lines_in_bytes": counts["lines_in_bytes"],
        "whole_words": counts["whole_words"] / max(counts["words"], 1),
        "in_bytes": sorted(in_bytes.items(), key=lambda each: (-each[1], each[0]))[:_MOST_CHARACTERS],
        "unused": int((tally.histograms["subwords"][learned] == 0).sum()),
        **{split: _cut_of(subwords, splits.texts(split)) for split in HELD_OUT if splits.texts(split)[0]},
    }


def _cut_of(subwords: Subwords, texts: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Return how the vocabulary cuts the text of dev or test."""
    lines = [*texts[0], *texts[1]]
    cut = WordEncoder(subwords).encode(lines)
    words = max(int(cut.num_words.sum()), 1)
    unlearned = [len(subwords.unlearned(line)) for line in lines]
    return {
        "subwords_per_word": len(cut.ids) / words,
        "whole_words": cut.num_whole / words,
        "characters": sum(map(len, lines)),
        "characters_in_bytes": sum(unlearned),
        "lines_in_bytes": sum(count > 0 for count in unlearned),
    }
