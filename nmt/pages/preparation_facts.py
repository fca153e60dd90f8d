"""What the pages about a preparation share: derived figures, names, and advice where figures are suspicious."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nmt.wording import counted, duration, percent

Report = dict[str, Any]
"""Contents of report/prepare.json, with all parts."""

MOST_EXAMPLES = 10
"""Examples shown per rule, change or augmentation."""
RATIO_WIDTH = 0.1
"""Width of a bin of the histogram of ratios, which begins at 1."""
MOST_SOURCES = 200
"""Files shown in the table of sources."""
LONGEST = 600
"""Most characters shown of a text."""
CHANGE_SETTINGS = {
    "punctuation": "corpus.punctuation",
    "unicode": "corpus.subwords.normalisation",
    "controls": "corpus.subwords.normalisation",
}
"""Setting of each change of the text that has one."""

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_JOINERS = "\u200c\u200d"  # parts of words in Persian and Hindi, and of emoji
_MUCH_DROPPED = 0.2  # share of the pairs read
_LITTLE_KEPT = 0.5
_MANY_BYTES = 0.001  # share of the characters
_MANY_UNUSED = 0.1  # share of the vocabulary
_HIGH_RATIO = 2.0
_MORE_SUBWORDS = 1.3  # subwords per word, in proportion to those of the training text
_MOST_NAMED = 5


class Advice(NamedTuple):
    """A remark on figures that a reader should look at."""

    severe: bool
    text: str
    """With {} in place of each of `names`."""
    names: tuple[str, ...] = ()
    """Settings, rules, files: text that may come from anybody."""


class Histogram(NamedTuple):
    """Counts of pairs by length or by ratio."""

    title: str
    series: dict[str, Sequence[int]]
    """Counts of the pairs "read" and "kept", as far as there are any. The last bin has all larger values too."""
    first: float = 0
    """Value of the first bin."""
    width: float = 1
    """Bin i has values from first + i width."""


class Spread(NamedTuple):
    """Figures of a histogram."""

    mean: float
    median: str
    most: str
    """Value that 99% of the pairs do not exceed."""


def share_of(part: float, whole: float) -> str:
    """Return a share in percent. Nearly all is never shown as all."""
    if not whole:
        return "–"
    share = part / whole
    return "over 99.9%" if 0.9995 <= share < 1 else percent(share)


def headline(report: Report) -> list[tuple[str, str]]:
    """Return the first figures that a reader wants, as (value, name)."""
    read, kept = report["pairs_read"], report["pairs_kept"]
    figures = [(f"{read:,}", "pairs read"), (f"{kept:,}", "pairs kept"), (share_of(kept, read), "share kept")]
    if report["held_out"]:
        figures.append((f"{report['held_out']:,}", "pairs held out"))
    if report["vocabulary"]:
        figures.append((f"{report['vocabulary']['size']:,}", "subwords in the vocabulary"))
    if report["seconds"]:
        processes = report["processes"]
        figures.append(
            (duration(sum(report["seconds"].values())), f"in {processes:,} process{'es' * (processes != 1)}")
        )
    return figures


def subject(report: Report) -> str:
    """Return what was prepared: its directions."""
    directions = report["directions"] or (["-".join(report["languages"])] if report["languages"] else [])
    more = f" and {len(directions) - 12} more" if len(directions) > 12 else ""
    return ", ".join(each.replace("-", " → ", 1) for each in directions[:12]) + more


def is_language(name: str) -> bool:
    """Return whether a text is like a code of a language: en, pt_BR."""
    return bool(_LANGUAGE.fullmatch(name))


def sides(report: Report) -> dict[str, str]:
    """Return a name of each side: its language, if there is one direction."""
    if len(report["directions"]) == 1 and len(report["languages"]) == 2 and all(map(is_language, report["languages"])):
        return dict(zip(("source", "target"), report["languages"], strict=True))
    return {"source": "source", "target": "target"}


def spread(histogram: Histogram, counts: Sequence[int]) -> Spread | None:
    """Return figures of one series of a histogram; None if it is empty."""
    total = sum(counts)
    if not total:
        return None
    first, width = histogram.first, histogram.width
    # Numbers of words are whole, so a bin has a single value. A ratio may be anywhere in its bin.
    middle = 0.0 if width == 1 else width / 2
    mean = sum((first + place * width + middle) * count for place, count in enumerate(counts)) / total

    def value(share: float) -> str:
        place, seen = 0, counts[0]
        while seen < share * total:
            place += 1
            seen += counts[place]
        return f"{first + place * width:g}" + (" or more" if place == len(counts) - 1 else "")

    return Spread(mean, value(0.5), value(0.99))


def lengths(report: Report) -> list[Histogram]:
    """Return the histograms that have pairs."""
    found: list[Histogram] = []
    histograms = report["histograms"]
    kinds = [kind for kind in ("read", "kept") if kind in histograms]
    for unit, title in (("words", "Words"), ("pieces", "Subwords")):
        for side, name in sides(report).items():
            found.append(Histogram(f"{title}, {name}", {kind: histograms[kind][unit].get(side, []) for kind in kinds}))
    ratios = {kind: histograms[kind]["ratio"] for kind in kinds}
    found.append(Histogram("Words of the longer side per word of the shorter", ratios, 1, RATIO_WIDTH))
    filled = (
        each._replace(series={kind: counts for kind, counts in each.series.items() if sum(counts)}) for each in found
    )
    return [each for each in filled if each.series]


def coverage(report: Report) -> list[list[str]]:
    """Return the rows of the table of the vocabulary: a name, then its figures on the training, dev and test text."""
    vocabulary = report["vocabulary"]
    texts: list[Mapping[str, Any]] = [vocabulary, vocabulary["dev"] or {}, vocabulary["test"] or {}]

    def row(name: str, key: str, form: str) -> list[str]:
        return [name, *(f"{each[key]:{form}}" if key in each else "–" for each in texts)]

    rows = [
        row("subwords per word", "subwords_per_word", ".3f"),
        row("words that are one subword", "whole_words", ".1%"),
        row("characters", "characters", ",d"),
        row("characters encoded as bytes", "characters_in_bytes", ",d"),
        row("lines with such characters", "lines_in_bytes", ",d"),
    ]
    shares = (
        share_of(each["characters_in_bytes"], each["characters"]) if "characters" in each else "–" for each in texts
    )
    rows.insert(4, ["their share", *shares])
    return rows


def source_rows(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of sources: path, pairs read, pairs kept, share."""
    return [
        (
            each["path"],
            f"{each['pairs_read']:,}",
            f"{each['pairs_kept']:,}",
            share_of(each["pairs_kept"], each["pairs_read"]),
        )
        for each in sources[:MOST_SOURCES]
    ]


def is_seen(character: str) -> bool:
    """Return whether a reader sees a character, or sees what it does within a word."""
    return character.isprintable() or character in _JOINERS


def code_point(character: str) -> str:
    """Return the code point of a character in the usual form: U+00A0."""
    return f"U+{ord(character):04X}"


# ------------------------------------------------------------------------------------------------- advice


def advice(report: Report) -> list[Advice]:
    """Return remarks on what is suspicious, the severe ones first."""
    found = [*_on_pairs(report), *_on_overlap(report), *_on_sources(report), *_on_text(report)]
    if report["vocabulary"]:
        found += _on_vocabulary(report["vocabulary"])
    return sorted(found, key=lambda each: not each.severe)


def _on_pairs(report: Report) -> Iterator[Advice]:
    read, kept, rules = report["pairs_read"], report["pairs_kept"], report["rules"]
    if not kept:
        yield Advice(True, "No pair was kept, so there is nothing to train on.")
    much = [rule for rule in rules if read and rule["pairs"] > _MUCH_DROPPED * read]
    for rule in much:
        setting = f"corpus.filters.{rule['name']}"
        if "duplicates" in rule["name"]:
            text = (
                f"{{}} dropped {share_of(rule['pairs'], read)} of the pairs: the text repeats itself, as text of the "
            )
            yield Advice(
                False, text + "web often does. If copies should count, switch off {}.", (rule["name"], setting)
            )
            continue
        yield Advice(
            True,
            f"{{}} dropped {share_of(rule['pairs'], read)} of the pairs. If its examples are good translations, loosen "
            "or switch off {}.",
            (rule["name"], setting),
        )
    if kept and not much and kept + report["held_out"] < _LITTLE_KEPT * read:
        yield Advice(
            True,
            f"Only {share_of(kept, read)} of the pairs were kept, although no rule alone dropped many. Look at the "
            "examples of each rule below; the rules are settings in {}.",
            ("corpus.filters",),
        )
    counted_pairs = kept + report["held_out"] + sum(rule["pairs"] for rule in rules)
    if counted_pairs != read:
        yield Advice(
            True,
            f"The counts do not add up: {read:,} pairs were read, but those kept, held out and dropped are "
            f"{counted_pairs:,}. Please report this as a fault of nmt.",
        )
    for each in report["augmented"]:
        if not each["pairs"]:
            yield Advice(
                False,
                "No pair was suitable for {}. Set {} to 0, or check that the text has what it needs.",
                (each["name"], f"corpus.examples.{each['name']}"),
            )


def _on_overlap(report: Report) -> Iterator[Advice]:
    for split, found in report["overlap"].items():
        harm = (
            "Scores on this set will be too high"
            if split == "test"
            else "Validation will look better than it is, and may choose a worse checkpoint"
        )
        both, source, target = (found[f"kept_with_{name}"] for name in ("both", "source", "target"))
        names = (split, "corpus.filters.test_overlap")
        if both:
            yield Advice(
                split == "test",
                f"{counted(both, 'kept training pair')} {'is' if both == 1 else 'are'} also in the {{}} set, with the "
                f"same source and target. {harm}: {{}} drops such pairs.",
                names,
            )
        elif source or target:
            yield Advice(
                False,
                f"The training text has the source of a pair of the {{}} set {counted(source, 'time')}, and the target "
                f"{counted(target, 'time')}, never both. This is normal for short sentences; {{}} drops such pairs.",
                names,
            )


def _on_sources(report: Report) -> Iterator[Advice]:
    unused = [each for each in report["sources"] if not each["pairs_kept"]]
    for each in unused[:_MOST_NAMED]:
        if each["pairs_read"]:
            text = (
                f"None of the {counted(each['pairs_read'], 'pair')} of {{}} was kept. Check that its two sides belong "
            )
            yield Advice(True, text + "together and that its languages are right.", (each["path"],))
        else:
            yield Advice(False, "{} has no pairs. Check that it is the right file.", (each["path"],))
    if len(unused) > _MOST_NAMED:
        more = counted(len(unused) - _MOST_NAMED, "more file")
        yield Advice(True, f"Nothing was kept of {more} either: see the table of sources.")


def _on_text(report: Report) -> Iterator[Advice]:
    kept = report["histograms"].get("kept")
    figures = spread(Histogram("", {}, 1, RATIO_WIDTH), kept["ratio"]) if kept else None
    if figures and figures.mean > _HIGH_RATIO:
        yield Advice(
            False,
            f"On average, one side has {figures.mean:.1f} times the words of the other. Sides may not belong together: "
            "{} drops such pairs. A language without blanks between words is no cause for concern.",
            ("corpus.filters.max_length_ratio",),
        )
    for side, found in report["characters"].items():
        damaged = sum(count for character, count in found if character == "\ufffd")
        if damaged:
            yield Advice(
                False,
                f"The {{}} side of the kept pairs has {counted(damaged, 'replacement character')} (U+FFFD). The text "
                "was damaged earlier, or bytes that are not UTF-8 were replaced: get a clean copy, or "
                "save it as UTF-8.",
                (side,),
            )


def _on_vocabulary(vocabulary: Mapping[str, Any]) -> Iterator[Advice]:
    in_bytes, characters = vocabulary["characters_in_bytes"], vocabulary["characters"]
    if characters and in_bytes > _MANY_BYTES * characters:
        yield Advice(
            False,
            f"{share_of(in_bytes, characters)} of the characters are encoded as bytes, because the vocabulary lacks "
            "them. Raise {}, or learn a vocabulary of this text with {}.",
            ("corpus.subwords.character_coverage", "corpus.subwords.vocabulary=learn"),
        )
    if vocabulary["unused"] > _MANY_UNUSED * vocabulary["size"]:
        yield Advice(
            False,
            f"{vocabulary['unused']:,} of the {vocabulary['size']:,} subwords never occur in the training text. Lower "
            "{}, or learn a vocabulary of this text with {}.",
            ("corpus.subwords.vocab_size", "corpus.subwords.vocabulary=learn"),
        )
    usual = vocabulary["subwords_per_word"]
    for split in ("dev", "test"):
        found = vocabulary[split]
        if found and usual and found["subwords_per_word"] > _MORE_SUBWORDS * usual:
            yield Advice(
                False,
                f"The {{}} set needs {found['subwords_per_word']:.2f} subwords per word, the training text "
                f"{usual:.2f}. They may be different kinds of text.",
                (split,),
            )
