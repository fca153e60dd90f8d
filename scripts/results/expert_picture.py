"""Make the small record behind the picture of a run's experts: from its report, what a picture can show.

  nmt experts RUN
  python -m scripts.results.expert_picture RUN/report/experts.json -o results/claim/experts.json

The record has each layer's figures, the load of each of its experts, and the words of a few experts: the most
specialised ones that have at least three typical words. Those of a decoder are the words that it has just read.
`experts` of a table in results/ draws it: `file` is the name of the picture, `text` its title, and `record` the record
below results/ without its ending, such as "claim/experts".
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nmt.errors import DataError, UserError, exit_status
from nmt.files import read_json, write_atomically
from scripts.results.pictures import COLOURS, Row, opening

NAMED, FEWEST_WORDS, MOST_WORDS = 5, 3, 4
"""Experts of a layer whose words are shown, and how many words these have."""
_LONGEST = 16  # characters of a word in the picture

_LEFT, _WIDE, _HEAD, _HIGH, _LINE = 64, 660, 62, 130, 19
_APART = 18  # of labels beside each other
_HALO = 'font-size="11" text-anchor="middle" stroke="white" stroke-width="4" paint-order="stroke"'


def record_of(report: Row) -> dict[str, Any]:
    """The record of a report that `nmt experts` wrote as JSON."""
    # Imported when needed: drawing a record needs no model.
    from nmt.experts.contexts import Context
    from nmt.experts.report import TokenRole
    from nmt.pages.experts import whole_word

    def word(role: Row) -> str:
        contexts = [Context(**each) for each in role["contexts"]]
        before, token, after = whole_word(TokenRole(**{**role, "contexts": contexts}))
        # A digit is a token by itself, whatever number it is in.
        return token if token.isdigit() else f"{before}{token}{after}"

    layers = []
    for layer in report["layers"]:
        named = []
        for row in sorted(layer["experts"], key=lambda row: (-row["specialisation"], row["expert"])):
            # Several subwords may be parts of the same word.
            words = list(dict.fromkeys(map(word, row["tokens"])))[:MOST_WORDS]
            if row["share"] and len(words) >= FEWEST_WORDS:
                named.append({"expert": row["expert"], "words": words, "bits": round(row["specialisation"], 2)})
        figures = ("layer", "num_tokens", "k", "cv_load", "max_over_mean_load", "idle_experts")
        purity = layer["token_purity"]
        layers.append(
            {name: round(layer[name], 3) if isinstance(layer[name], float) else layer[name] for name in figures}
            | {"revealed": round(purity["share"], 4), "revealed_by_chance": round(purity["chance_share"], 4)}
            | {"loads": [round(row["share"], 6) for row in layer["experts"]], "named": named[:NAMED]}
        )
    return {"text": report["title"], "layers": layers}


def loads(chart: Row, record: Row) -> str:
    """The load of each expert of each layer, the busiest first, with the words of those that are named."""
    height, parts = 34, list[str]()
    for layer in record["layers"]:
        parts += _panel(layer, height)
        height += _HEAD + _HIGH + 26 + _LINE * len(layer["named"]) + 14
    lines = [
        *opening(chart["text"], _LEFT + _WIDE + 16, height),
        f'<text x="8" y="20" font-weight="bold">{escape(chart["text"])}</text>',
    ]
    return "\n".join([*lines, *parts, "</svg>", ""])


def _panel(layer: Row, top: float) -> Iterator[str]:
    """The lines of one layer, whose title is at `top`."""
    shares: Sequence[float] = layer["loads"]
    ranked = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
    highest, step, bottom = max(shares), _WIDE / len(shares), top + _HEAD + _HIGH
    colour = {each["expert"]: COLOURS[1:][place % (len(COLOURS) - 1)] for place, each in enumerate(layer["named"])}
    for y, weight, line in zip((top + 18, top + 36), ("bold", "normal"), _figures(layer), strict=True):
        yield f'<text x="8" y="{y}" font-weight="{weight}">{escape(line)}</text>'
    labels, last = list[str](), -math.inf
    for rank, expert in enumerate(ranked):
        high, x = _HIGH * shares[expert] / highest, _LEFT + rank * step
        wide = step * 0.82 if step > 4 else step
        # A bar in colour is seen even if there are hundreds of them.
        wide, filled = (max(wide, 2.5), colour[expert]) if expert in colour else (wide, "#b8c4d0")
        size = f'width="{wide:.2f}" height="{high:.1f}"'
        yield f'<rect x="{x:.2f}" y="{bottom - high:.1f}" {size} fill="{filled}"/>'
        middle = x + wide / 2
        # Where there is no room for a number, the colour leads to it.
        if expert in colour and middle - last >= _APART:
            last = middle
            labels.append(f'<text x="{middle:.1f}" y="{bottom - high - 5:.1f}" {_HALO}>{expert}</text>')
    fair = bottom - _HIGH / len(shares) / highest
    yield f'<path d="M{_LEFT} {fair:.1f}H{_LEFT + _WIDE}" stroke="#24292f" stroke-dasharray="4 3"/>'
    yield f'<path d="M{_LEFT} {bottom}H{_LEFT + _WIDE}" stroke="#24292f"/>'
    yield from labels
    for share, y in ((highest, bottom - _HIGH), (0.0, bottom)):
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.1%}</text>'
    for place, each in enumerate(layer["named"]):
        y = bottom + 26 + _LINE * place
        words = " · ".join(word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…" for word in each["words"])
        yield f'<rect x="{_LEFT}" y="{y - 10}" width="11" height="11" fill="{colour[each["expert"]]}"/>'
        yield f'<text x="{_LEFT + 20}" y="{y}">expert {each["expert"]}: {escape(words)}</text>'


def _figures(layer: Row) -> tuple[str, str]:
    """The two lines above a layer."""
    return (
        f"{layer['layer']}: {len(layer['loads']):,} experts, {layer['k']:.3g} per token",
        f"The busiest has {layer['max_over_mean_load']:.2f} times the equal share (dashed). An expert reveals "
        f"{layer['revealed']:.0%} about a token ({layer['revealed_by_chance']:.0%} by chance).",
    )


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report/experts.json of a run, which nmt experts writes")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    output: Path = options.output
    try:
        if not options.report.is_file():
            raise UserError(f"{options.report} is missing: write it with nmt experts RUN")
        try:
            record = record_of(read_json(options.report, {"title": str, "layers": [{"experts": [{"tokens": [{}]}]}]}))
        except (ValueError, KeyError) as error:
            raise DataError(f"{options.report} is no report of nmt experts: {error}") from error
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    except (UserError, OSError) as error:
        print(f"expert_picture: {error}", file=sys.stderr)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
