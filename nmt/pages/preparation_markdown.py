"""The report of `nmt prepare` as Markdown: the figures and examples of the page, without its charts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nmt.pages.markdown import code, plain, wrapped
from nmt.pages.preparation_facts import (
    CHANGE_SETTINGS,
    LONGEST,
    MOST_EXAMPLES,
    MOST_SOURCES,
    Report,
    advice,
    code_point,
    coverage,
    headline,
    is_seen,
    lengths,
    share_of,
    sides,
    source_rows,
    spread,
    subject,
)
from nmt.pages.tables import markdown_table
from nmt.wording import counted, duration

_MOST_CHARACTERS = 60


def preparation_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    sections: dict[str, Callable[[Report], Iterable[str]]] = {
        "What was dropped": _rules,
        "What was changed": _changes,
        "Lengths": _lengths,
        "Characters": _characters,
        "Vocabulary": _vocabulary,
        "Overlap with dev and test": _overlap,
        "Rewritten pairs": _augmented,
        "Final pairs": _final,
        "Sources": _sources,
        "Time": _seconds,
    }
    lines = [f"# Preparation of {plain(report['name'])}", "", plain(subject(report)), ""]
    lines += [f"{code(report['path'])}", ""] if report["path"] else []
    lines += [f"- **{value}** {name}" for value, name in headline(report)]
    lines += ["", "## Worth a look", "", *_advice(report)]
    for title, section in sections.items():
        content = list(section(report))
        if content:
            lines += ["", f"## {title}", "", *content]
    return "".join(f"{wrapped(line)}\n" for line in lines)


def _advice(report: Report) -> Iterator[str]:
    found = advice(report)
    for each in found:
        remark = each.text.format(*map(code, each.names))
        yield f"- **{remark}**" if each.severe else f"- {remark}"
    if not found:
        yield "No figure is suspicious."


# ------------------------------------------------------------------------------------------------- texts


def _text(content: str) -> str:
    """Return a text, with characters that cannot be seen shown by their code points, and a long text cut."""
    more = len(content) - LONGEST
    rest = f"… ({counted(more, 'more character')})" if more > 0 else ""
    seen = (each if is_seen(each) else f"⟨{code_point(each)}⟩" for each in content[:LONGEST])
    return plain("".join(seen)) + rest


def _place(example: Mapping[str, Any]) -> str:
    row = "" if example["row"] is None else f"row {example['row']:,}"
    score = "" if example["score"] is None else f"score {example['score']:.3f}"
    file = code(example["file"]) if example["file"] else ""
    return ", ".join(part for part in (plain(example["direction"]), file, row, score) if part)


def _examples(examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = []
    for example in examples:
        before = [example.get(f"before_{side}") for side in ("source", "target")]
        after = [_text(example[side]) for side in ("source", "target")]
        if before != [None, None]:
            rows.append((f"{_place(example)}, before", *(_text(each or "") for each in before)))
            rows.append(("after", *after))
        else:
            rows.append((_place(example), *after))
    yield from markdown_table(("pair", "source", "target"), rows)


def _listed(found: Sequence[Mapping[str, Any]], setting: Callable[[str], str], whole: int, what: str) -> Iterator[str]:
    """Yield a table of rules, changes or augmentations, then their examples. `what` heads the column of reasons."""
    rows = (
        (
            plain(each.get("why", "") or each["name"].replace("_", " ")),
            code(setting(each["name"])) if setting(each["name"]) else "–",
            f"{each['pairs']:,}",
            share_of(each["pairs"], whole),
        )
        for each in found
    )
    yield from markdown_table((what, "setting", "pairs", "share"), rows)
    for each in found:
        if each["examples"]:
            part = each["examples"][:MOST_EXAMPLES]
            yield ""
            yield f"### {plain(each['name'])}: {len(part)} of {counted(each['pairs'], 'pair')}"
            yield ""
            yield from _examples(part)


def _rules(report: Report) -> Iterator[str]:
    if report["rules"]:
        yield from _listed(report["rules"], lambda name: f"corpus.filters.{name}", report["pairs_read"], "dropped")
    else:
        yield "No rule was active."


def _changes(report: Report) -> Iterator[str]:
    if report["changes"]:
        yield from _listed(
            report["changes"], lambda name: CHANGE_SETTINGS.get(name, ""), report["pairs_read"], "changed"
        )


def _augmented(report: Report) -> Iterator[str]:
    if report["augmented"]:
        found = report["augmented"]
        yield from _listed(found, lambda name: f"corpus.examples.{name}", report["pairs_kept"], "rewritten")


def _final(report: Report) -> Iterator[str]:
    if report["final_pairs"]:
        yield from _examples(report["final_pairs"][:100])


# ------------------------------------------------------------------------------------------------- figures


def _lengths(report: Report) -> Iterator[str]:
    rows = []
    for each in lengths(report):
        for kind, counts in each.series.items():
            if figures := spread(each, counts):
                rows.append((plain(each.title), kind, f"{figures.mean:.3g}", figures.median, figures.most))
    if rows:
        yield from markdown_table(("", "pairs", "mean", "median", "99% have at most"), rows)


def _counts(characters: Sequence[Sequence[Any]]) -> str:
    def glyph(character: str) -> str:
        return code(character) if character.isprintable() and character != " " else code_point(character)

    return ", ".join(f"{glyph(character)} {count:,}" for character, count in characters[:_MOST_CHARACTERS])


def _characters(report: Report) -> Iterator[str]:
    for side, name in sides(report).items():
        found = report["characters"].get(side, [])
        if found:
            different = report["num_characters"].get(side, len(found))
            yield f"- {plain(name)}: {counted(different, 'different character')}. {_counts(found)}"


def _vocabulary(report: Report) -> Iterator[str]:
    vocabulary = report["vocabulary"]
    if not vocabulary:
        return
    kind = f" ({plain(vocabulary['kind'])})" if vocabulary["kind"] else ""
    origin = f", {plain(vocabulary['from'])}" if vocabulary["from"] else ""
    yield f"{vocabulary['size']:,} subwords{kind}{origin}; {vocabulary['unused']:,} are never used."
    yield ""
    yield from markdown_table(("", "training", "dev", "test"), coverage(report))
    if vocabulary["in_bytes"]:
        yield ""
        yield f"Characters encoded as bytes: {_counts(vocabulary['in_bytes'])}"


def _overlap(report: Report) -> Iterator[str]:
    if report["overlap"]:
        keys = "pairs", "kept_with_source", "kept_with_target", "kept_with_both"
        rows = ((plain(split), *(f"{found[key]:,}" for key in keys)) for split, found in report["overlap"].items())
        head = "set", "its pairs", "training pairs with a source of it", "with a target of it", "with both"
        yield from markdown_table(head, rows)


def _sources(report: Report) -> Iterator[str]:
    sources = report["sources"]
    if sources:
        rows = ((code(path), *figures) for path, *figures in source_rows(sources))
        yield from markdown_table(("file", "pairs read", "pairs kept", "share"), rows)
    if len(sources) > MOST_SOURCES:
        yield ""
        yield f"{counted(len(sources) - MOST_SOURCES, 'more file')}: see prepare.json."


def _seconds(report: Report) -> Iterator[str]:
    seconds = report["seconds"]
    if seconds:
        total = sum(seconds.values())
        rows = ((plain(stage), duration(spent), share_of(spent, total)) for stage, spent in seconds.items())
        yield from markdown_table(("stage", "time", "share"), rows)
