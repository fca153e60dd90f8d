"""The report of `nmt prepare` as a self-contained HTML page, light or dark like the reader's system.

Texts may be of any script and come from anybody: they are escaped, and each has its own direction. Characters that
cannot be seen are shown by their code points, since they are often why a text was changed or dropped.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from nmt.pages.charts import histogram, meter
from nmt.pages.document import document, text
from nmt.pages.preparation_facts import (
    CHANGE_SETTINGS,
    LONGEST,
    MOST_EXAMPLES,
    MOST_SOURCES,
    Histogram,
    Report,
    advice,
    code_point,
    coverage,
    headline,
    is_language,
    is_seen,
    lengths,
    share_of,
    sides,
    source_rows,
    spread,
    subject,
)
from nmt.pages.style import CHARTS, PANELS, PREPARATION
from nmt.pages.tables import html_table
from nmt.text.words import differences
from nmt.wording import counted, duration

_MOST_BARS = 50
_MOST_SHOWN, _MOST_RARE = 40, 20  # characters that are not folded: frequent ones, rare ones

_HOW = {
    "rules": "Rules are applied in this order, and a pair counts for the first rule that drops it. Open a rule to see "
    "examples. ",
    "changes": "Pairs read whose text is changed on its way into the model, whether a rule drops them or not. Changed "
    "words are marked where the text before is known.",
    "lengths": "Words are separated by blanks. Orange: pairs that were read; blue: those that were kept. ",
    "characters": "Characters of the kept text, the most frequent first. Hold the pointer over one to see its name.",
    "vocabulary": "How well the subwords fit the text. A character that the vocabulary lacks is encoded as the bytes "
    "of its UTF-8 form, which a model learns badly.",
    "overlap": "How often a kept training pair has the source, the target or both of a pair of the dev or test set. "
    "Text that a model was trained on cannot measure it.",
    "augmented": "Training pairs that were rewritten, so that the model learns such forms too.",
    "final": "Kept pairs, drawn at random, as they are encoded for training.",
}


def preparation_page(report: Report) -> str:
    """Return the whole page."""
    sections = [
        ("dropped", "What was dropped", _rules(report)),
        ("changed", "What was changed", _changes(report)),
        ("lengths", "Lengths", _lengths(report)),
        ("characters", "Characters", _characters(report)),
        ("vocabulary", "Vocabulary", _vocabulary(report["vocabulary"])),
        ("overlap", "Overlap with dev and test", _overlap(report["overlap"])),
        ("augmented", "Rewritten pairs", _augmented(report)),
        ("final", "Final pairs", _final(report["final_pairs"])),
        ("sources", "Sources", _sources(report["sources"])),
        ("time", "Time", _seconds(report["seconds"])),
    ]
    present = [each for each in sections if each[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in present)
    bodies = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>\n' for name, heading, content in present
    )
    title = f"Preparation of {report['name']}"
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in headline(report))
    place = f"<br><code>{shown(report['path'])}</code>" if report["path"] else ""
    head = f"<h1><bdi>{shown(title)}</bdi></h1><p class=soft><bdi>{shown(subject(report))}</bdi>{place}</p>"
    body = f"{head}<div class=tiles>{tiles}</div>{_advice(report)}<nav>{links}</nav>\n{bodies}"
    return document(title, body, PANELS, CHARTS, PREPARATION)


def _advice(report: Report) -> str:
    found = advice(report)
    if not found:
        return '<div class="advice fine"><p>No figure is suspicious.</p></div>'
    items = []
    for each in found:
        names = (f"<code>{shown(name)}</code>" for name in each.names)
        kind = "severe" if each.severe else "mild"
        items.append(f"<li class={kind}>{each.text.format(*names)}</li>")
    return f'<div class="advice"><h3>Worth a look</h3><ul>{"".join(items)}</ul></div>'


# ------------------------------------------------------------------------------------------------- texts


def shown(content: str) -> str:
    """Return a text as HTML, with characters that cannot be seen shown by their code points, and a long text cut."""
    return "".join(_visible(part) for part in _runs(content[:LONGEST])) + _rest(content)


def _runs(content: str) -> Iterator[str]:
    """Yield visible stretches of a text, and each character that cannot be seen by itself."""
    for visible, run in groupby(content, is_seen):
        if visible:
            yield "".join(run)
        else:
            yield from run


def _visible(run: str) -> str:
    if len(run) > 1 or is_seen(run):
        return text(run)
    return f'<i class=unseen title="{text(_name(run))}">{code_point(run)[2:]}</i>'


def _name(character: str) -> str:
    return f"{code_point(character)} {unicodedata.name(character, '')}".strip()


def _rest(content: str) -> str:
    more = len(content) - LONGEST
    return f"<span class=soft>… ({counted(more, 'more character')})</span>" if more > 0 else ""


def _marked(before: str, after: str) -> tuple[str, str]:
    """Return two forms of a text with the words marked in which they differ."""
    marked = (
        "".join(f"<mark>{shown(part)}</mark>" if differs else shown(part) for part, differs in side) + _rest(each)
        for each, side in zip((before, after), differences(before[:LONGEST], after[:LONGEST]), strict=True)
    )
    first, second = marked
    return first, second


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    return "".join(map(_example, examples))


def _example(example: Mapping[str, Any]) -> str:
    source, _, target = example["direction"].partition("-")
    row = "" if example["row"] is None else f", row {example['row']:,}"
    place = f"<bdi>{shown(example['file'])}</bdi>{row}" if example["file"] else row.removeprefix(", ")
    score = "" if example["score"] is None else f"score {example['score']:.3f}"
    facts = (shown(example["direction"]), place, score)
    head = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    columns = (_side(example, side, language) for side, language in (("source", source), ("target", target)))
    return f"<article class=example><header>{head}</header><div class=sides>{''.join(columns)}</div></article>"


def _side(example: Mapping[str, Any], side: str, language: str) -> str:
    """Return one side of an example; if it was changed, the text before and after."""
    known = f' lang="{language.replace("_", "-")}"' if is_language(language) else ""
    content = example[side]
    before = example.get(f"before_{side}")
    if before in (None, content):
        return f'<p dir="auto"{known}>{_or_empty(content, shown(content))}</p>'
    marked = zip(("before", "after"), (before, content), _marked(before, content), strict=True)
    lines = (f'<dt>{name}</dt><dd dir="auto"{known}>{_or_empty(whole, line)}</dd>' for name, whole, line in marked)
    return f"<dl>{''.join(lines)}</dl>"


def _or_empty(content: str, line: str) -> str:
    if content.strip(" "):
        return line
    return f"<i class=soft>{counted(len(content), 'blank') if content else 'empty'}</i>"


# ------------------------------------------------------------------------------------------------- rules and changes


def _fold(summary: str, examples: Sequence[Mapping[str, Any]], count: int) -> str:
    """Return a row that opens to examples, if there are any. `count` is of all such pairs."""
    if not examples:
        return f'<div class="row{"" if count else " none"}">{summary}</div>'
    part = examples[:MOST_EXAMPLES]
    note = f"{len(part)} of {counted(count, 'pair')}" if len(part) < count else f"All {counted(count, 'pair')}"
    if count == 1:
        note = "The only pair"
    return (
        f"<details><summary class=row>{summary}</summary><div class=body><p class=how>{note}</p>{_examples(part)}"
        "</div></details>"
    )


def _row(title: str, setting: str, count: int, whole: int, widest: int, kind: str = "") -> str:
    """Return the cells of a row: title and setting, bar, count, share of `whole`. The bar of `widest` is full."""
    bar = meter(f"{100 * count / widest if widest else 0:.2f}%", kind)
    code = f"<code>{shown(setting)}</code>" if setting else ""
    return (
        f"<span class=what><b>{shown(title)}</b>{code}</span>{bar}<span class=count>{count:,}</span>"
        f"<span class=part>{share_of(count, whole)}</span>"
    )


def _rules(report: Report) -> str:
    read, kept, held, rules = report["pairs_read"], report["pairs_kept"], report["held_out"], report["rules"]
    dropped = sum(rule["pairs"] for rule in rules)
    parts = [("load", "kept", kept), ("chance", "held out", held), ("importance", "dropped", dropped)]
    whole = max(1, kept + held + dropped)
    stack = "".join(f'<i class="{kind}" style="width:{100 * count / whole:.3f}%"></i>' for kind, _, count in parts)
    key = "".join(
        f'<i class="{kind}"></i>{name} {count:,} ({share_of(count, read)})'
        for kind, name, count in parts
        if count or kind != "chance"
    )
    flow = f"<div class=flow><span class=bar>{stack}</span><p class=key>{key}</p></div>"
    if not rules:
        return f"{flow}<p class=soft>No rule was active.</p>"
    widest = max(rule["pairs"] for rule in rules)
    rows = (
        _fold(
            _row(
                rule["why"] or rule["name"], f"corpus.filters.{rule['name']}", rule["pairs"], read, widest, "importance"
            ),
            rule["examples"],
            rule["pairs"],
        )
        for rule in rules
    )
    scale = f"A full bar is {share_of(widest, read)} of the pairs read." if widest else "No rule dropped any pair."
    return f"{flow}<p class=how>{_HOW['rules']}{scale}</p><div class=rows>{''.join(rows)}</div>"


def _changes(report: Report) -> str:
    found = report["changes"]
    widest = max((each["pairs"] for each in found), default=0)
    rows = (
        _fold(
            _row(
                each["why"] or each["name"],
                CHANGE_SETTINGS.get(each["name"], ""),
                each["pairs"],
                report["pairs_read"],
                widest,
            ),
            each["examples"],
            each["pairs"],
        )
        for each in found
    )
    return f"<p class=how>{_HOW['changes']}</p><div class=rows>{''.join(rows)}</div>" if found else ""


def _augmented(report: Report) -> str:
    found = report["augmented"]
    widest = max((each["pairs"] for each in found), default=0)
    rows = (
        _fold(
            _row(
                each["name"].replace("_", " "),
                f"corpus.examples.{each['name']}",
                each["pairs"],
                report["pairs_kept"],
                widest,
            ),
            each["examples"],
            each["pairs"],
        )
        for each in found
    )
    return f"<p class=how>{_HOW['augmented']}</p><div class=rows>{''.join(rows)}</div>" if found else ""


# ------------------------------------------------------------------------------------------------- figures


def _lengths(report: Report) -> str:
    panels = []
    for each in lengths(report):
        notes = "".join(
            f"<p class=key><i class={kind}></i>{kind}: mean {figures.mean:.3g}, median {figures.median}, 99% have at "
            f"most {figures.most}</p>"
            for kind, counts in each.series.items()
            if (figures := spread(each, counts))
        )
        chart = histogram(*_gathered(each), "pairs", each.title)
        panels.append(f"<div class=panel><h3>{text(each.title)}</h3>{chart}{notes}</div>")
    return f"<p class=how>{_HOW['lengths']}</p><div class=panels>{''.join(panels)}</div>" if panels else ""


def _gathered(histogram: Histogram) -> tuple[dict[str, list[int]], list[str]]:
    """Return (series with few enough bins to draw, a label per bin). The last bin has the longest 0.5%."""
    size = max(map(len, histogram.series.values()))
    padded = {kind: [*counts, *[0] * (size - len(counts))] for kind, counts in histogram.series.items()}
    largest = max(padded.values(), key=sum)
    seen, end = 0, 0
    while end < size - 1 and seen < 0.995 * sum(largest):
        seen += largest[end]
        end += 1
    step = max(1, -(-end // _MOST_BARS))
    starts = list(range(0, end, step)) or [0]
    found = {kind: [sum(counts[at : at + step]) for at in starts] for kind, counts in padded.items()}

    def value(place: int) -> str:
        return f"{histogram.first + place * histogram.width:g}"

    labels = [value(at) if step == 1 else f"{value(at)} to {value(at + step - 1)}" for at in starts]
    rest = starts[-1] + step
    if any(sum(counts[rest:]) for counts in padded.values()):
        found = {kind: [*bins, sum(padded[kind][rest:])] for kind, bins in found.items()}
        labels.append(f"{value(rest)} or more")
    return found, labels


def _chips(characters: Iterable[Sequence[Any]]) -> str:
    chips = (
        f'<span class=chip title="{text(_name(character))}"><b>{_glyph(character)}</b>{count:,}</span>'
        for character, count in characters
    )
    return f"<div class=chips>{''.join(chips)}</div>"


def _glyph(character: str) -> str:
    if character == " ":
        return "␣"
    # A mark is drawn on the letter before it.
    mark = unicodedata.category(character).startswith("M")
    return f"<bdi>◌{text(character)}</bdi>" if mark else f"<bdi>{_visible(character)}</bdi>"


def _characters(report: Report) -> str:
    parts = []
    for side, name in sides(report).items():
        found = report["characters"].get(side, [])
        if not found:
            continue
        different = report["num_characters"].get(side, len(found))
        # Rare characters are often errors. They are known if the list is complete.
        rare = found[_MOST_SHOWN:][-_MOST_RARE:] if len(found) >= different else []
        rest = found[_MOST_SHOWN : len(found) - len(rare)]
        folded = f"<details class=more><summary>{len(rest):,} more</summary>{_chips(rest)}</details>" if rest else ""
        folded += f"<p class=how>the rarest</p>{_chips(rare)}" if rare else ""
        parts.append(
            f"<div class=panel><h3>{text(name)}</h3><p class=how>{counted(different, 'different character')}</p>"
            f"{_chips(found[:_MOST_SHOWN])}{folded}</div>"
        )
    return f"<p class=how>{_HOW['characters']}</p><div class=panels>{''.join(parts)}</div>" if parts else ""


def _vocabulary(vocabulary: Mapping[str, Any] | None) -> str:
    if not vocabulary:
        return ""
    facts = (
        (f"{vocabulary['size']:,}", "subwords"),
        (shown(vocabulary["kind"]) or "–", "kind"),
        (f"{vocabulary['subwords_per_word']:.2f}", "subwords per word"),
        (f"{vocabulary['whole_words']:.1%}", "of the words are one subword"),
        (share_of(vocabulary["characters_in_bytes"], vocabulary["characters"]), "of the characters in bytes"),
        (f"{vocabulary['unused']:,}", "subwords never used"),
    )
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    origin = f" Vocabulary: <bdi>{shown(vocabulary['from'])}</bdi>." if vocabulary["from"] else ""
    table = _wide(("", "training", "dev", "test"), coverage({"vocabulary": vocabulary}))
    rare = vocabulary["in_bytes"][:200]
    lacking = f"<h2 class=sub>Characters encoded as bytes</h2>{_chips(rare)}" if rare else ""
    return f"<p class=how>{_HOW['vocabulary']}{origin}</p><div class=tiles>{tiles}</div>{table}{lacking}"


def _wide(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div class=wide>{html_table(head, rows)}</div>"


def _overlap(overlap: Mapping[str, Mapping[str, int]]) -> str:
    if not overlap:
        return ""
    keys = "pairs", "kept_with_source", "kept_with_target", "kept_with_both"
    rows = [[shown(split), *(f"{found[key]:,}" for key in keys)] for split, found in overlap.items()]
    test = overlap.get("test", {}).get("kept_with_both", 0)
    warning = (
        f"<p class=warning>{counted(test, 'kept training pair')} {'is' if test == 1 else 'are'} also in the test set. "
        "Scores on it will be too high.</p>"
        if test
        else ""
    )
    head = ("set", "its pairs", "training pairs with a source of it", "with a target of it", "with both")
    return f"{warning}<p class=how>{_HOW['overlap']}</p>{_wide(head, rows)}"


def _final(pairs: Sequence[Mapping[str, Any]]) -> str:
    return f"<p class=how>{_HOW['final']}</p>{_examples(pairs[:100])}" if pairs else ""


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = [[f"<bdi>{shown(path)}</bdi>", *figures] for path, *figures in source_rows(sources)]
    more = len(sources) - MOST_SOURCES
    note = f"<p class=how>{counted(more, 'more file')}: see prepare.json.</p>" if more > 0 else ""
    return _wide(("file", "pairs read", "pairs kept", "share"), rows) + note


def _seconds(seconds: Mapping[str, float]) -> str:
    longest, total = max(seconds.values(), default=0.0), sum(seconds.values())
    rows = "".join(
        f"<div class=row><span class=what><b>{shown(stage)}</b></span>"
        f"{meter(f'{100 * spent / longest if longest else 0:.2f}%')}"
        f"<span class=count>{duration(spent)}</span><span class=part>{share_of(spent, total)}</span></div>"
        for stage, spent in seconds.items()
    )
    return f"<div class=rows>{rows}</div>" if rows else ""
