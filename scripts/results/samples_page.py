"""Samples of translations as Markdown, from a file of scripts/results/samples.py.

A table of results shows them with `samples`, the file below results/ without its ending, such as "claim/samples". Its
`systems` maps the names of runs to what readers call them, in order. `experts_of` is the run whose experts are shown.
"""

from collections.abc import Iterator
from typing import Any

from nmt.config import LayerName
from nmt.pages.markdown import plain, wrapped
from nmt.pages.tables import markdown_table

Result = dict[str, Any]

_KEY = (
    "Rows named after layers show experts{of}. The number at a word is the expert with the largest share of the gates "
    "of its subwords. It is bold if that is at least half. Experts of the encoder read the source; those of the "
    "decoder write the translation. The last row has three experts of each layer. Without one of them, the translation "
    "would be less probable by the number of nats in brackets."
)
_JOINED = "&#8288;"
"""Between a word and its number, where a line must not break."""


def samples_as_markdown(of_table: Result, record: Result) -> Iterator[str]:
    """The lines of a page. Each sample is a quotation, as nobody here wrote its text."""
    yield wrapped(f"All lines are of `{record['source']}`. {record['rule']} chrF2 is that of the one sentence.")
    if run := of_table.get("experts_of"):
        yield ""
        yield wrapped(_KEY.format(of=f' of the system "{plain(of_table["systems"][run])}"'))
    for sample in record["samples"]:
        yield ""
        yield f"#### Line {sample['line']:,}"
        yield ""
        yield from (f"> {line}" for line in markdown_table(("", "text", "chrF2"), _rows(of_table, sample)))


def _rows(of_table: Result, sample: Result) -> Iterator[tuple[str, str, str]]:
    found = {each["run"]: each for each in sample["systems"]}
    yield "source", plain(sample["source"]), ""
    yield "reference", plain(sample["reference"]), ""
    shown = [(found[run], name) for run, name in of_table["systems"].items()]
    best = max(system["chrF2"] for system, _ in shown)
    for system, name in shown:
        score = f"{system['chrF2']:.1f}"
        yield plain(name), plain(system["translation"]), f"**{score}**" if system["chrF2"] == best else score
    if run := of_table.get("experts_of"):
        layers = sorted(found[run]["layers"], key=lambda each: LayerName.of(each["layer"]).side != "encoder")
        for layer in layers:
            yield layer["layer"], _marked(layer), ""
        yield "needed most", "; ".join(map(_needed, layers)) or "-", ""


def _needed(layer: Result) -> str:
    experts = ", ".join(f"**{each['expert']}** ({each['nats']:.1f})" for each in layer["needed"])
    return f"{layer['layer']}: {experts or '-'}"


def _marked(layer: Result) -> str:
    """The words of a layer, each with the number of its strongest expert."""
    parts = []
    for word, expert, share in zip(layer["words"], layer["experts"], layer["shares"], strict=True):
        number = "" if expert is None else f"{_JOINED}<sup>{f'<b>{expert}</b>' if share >= 0.5 else expert}</sup>"
        parts.append(f"{plain(word)}{number}")
    return " ".join(parts)
