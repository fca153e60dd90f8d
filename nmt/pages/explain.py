"""An explanation as one HTML page that needs nothing else: no script, no network; light or dark as the reader likes.

A chip is an expert: its width is the gate, its colour the contribution, blue for what the translation would be less
probable without and orange for what it would be more probable without. The page is well-formed XML as well.
"""

import html
import re

from nmt.config import LayerName
from nmt.experts.explain import ExpertTotal, Explanation, LayerExplanation, Slot, expert_name

_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1c1c1a; --soft: #6b6a65; --line: #e2e1dc; --zero: #eceae4;
  --gain: #4a90d9; --loss: #e8853a; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --ink: #ecebe6; --soft: #a09f98; --line: #34332f;
  --zero: #33322e; --gain: #2f6fb5; --loss: #b3591a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 1rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 60rem; } .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0 0 1.25rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center; color: var(--soft); }
.ramp { display: inline-block; width: 14rem; height: .9rem; border-radius: 3px; vertical-align: middle;
  background: linear-gradient(to right, var(--loss), var(--zero), var(--gain)); }
table { border-collapse: collapse; width: 100%; margin-top: .5rem; }
td, th { padding: 3px .75rem 3px 0; border-bottom: 1px solid var(--line); vertical-align: middle; text-align: left;
  font-weight: normal; } thead th { color: var(--soft); font-size: .8rem; }
.place, .number { color: var(--soft); text-align: right; font-variant-numeric: tabular-nums; width: 1%;
  white-space: nowrap; }
.piece { width: 1%; min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
.chips { display: flex; flex-wrap: wrap; gap: 3px; }
.chip { display: block; width: calc(var(--gate, 0) * min(36rem, 55vw)); min-width: max-content; padding: 1px 6px;
  border-radius: 4px; font-size: .8rem; white-space: nowrap; overflow: hidden; font-variant-numeric: tabular-nums;
  background: var(--zero); background: color-mix(in oklab, var(--tint) var(--strength), var(--zero)); }
.gain { --tint: var(--gain); } .loss { --tint: var(--loss); } .chip b { margin-right: .35rem; }
"""

_MEANING = """
The contribution of an expert at a position is the log-probability of the translation, less what it is when the term
g<sub>i</sub> E<sub>i</sub>(x) is left out of that layer's sum (before its sigmoid, if it has one) at that one position.
The layer's other gates stay as they were; all that follows is computed anew. Nothing is estimated; the unit is the nat.
Positive (blue): the translation would be less probable without this expert there. Contributions do not add up. An
encoder position reads its piece; a decoder position predicts its piece, having read the one before.
"""

# What XML cannot hold, however it is written.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_ROUNDING = {"bf16": ", which rounds contributions by some hundredths of a nat (decoding.precision=fp32 is finer)"}


def explanation_page(explanation: Explanation) -> str:
    """The page, from its doctype on."""
    facts = {
        "source": f"<bdi>{_text(explanation.sentence)}</bdi>",
        "translation": f"<bdi>{_text(explanation.translation)}</bdi>",
        "log-probability": f"{explanation.log_probability:z.3f} nats, {len(explanation.target_pieces)} pieces",
        "computed in": explanation.precision + _ROUNDING.get(explanation.precision, ""),
    }
    listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts.items())
    layers = "".join(_layer(explanation, layer) for layer in explanation.layers)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Experts: {_text(explanation.sentence)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>What each expert gave to this translation</h1><dl>{listed}</dl>\n<p>{_MEANING}</p>\n"
        f'<p class="legend"><span>less probable with it <span class="ramp"></span> more probable with it</span>'
        f"<span>width: gate value (its text at least)</span><span>in a chip: expert, contribution</span></p>\n"
        f"{layers}</body></html>\n"
    )


def _layer(explanation: Explanation, layer: LayerExplanation) -> str:
    strongest = max((abs(slot.contribution) for slots in layer.positions for slot in slots), default=0.0)
    decoder = LayerName.of(layer.layer).side == "decoder"
    rows = []
    for place, (piece, slots) in enumerate(zip(explanation.pieces_of(layer), layer.positions, strict=True)):
        chips = "".join(_chip(slot, strongest) for slot in slots) or '<span class="soft">no expert</span>'
        number = f'<td class="number">{explanation.piece_log_probabilities[place]:z.2f}</td>' if decoder else ""
        rows.append(
            f'<tr><td class="place">{place}</td><td class="piece"><bdi>{_text(piece)}</bdi></td>{number}'
            f'<td><div class="chips">{chips}</div></td></tr>\n'
        )
    totals = "".join(_total(each, strongest) for each in layer.experts) or '<span class="soft">none was chosen</span>'
    head = "<th></th><th>predicts</th><th>log P</th>" if decoder else "<th></th><th>reads</th>"
    facts = f"{layer.num_experts} experts, {len(layer.experts)} of them chosen here; full colour: {strongest:.3f} nats"
    if any(each.group is not None for each in layer.experts):
        facts += "; in a chip: group/expert"
    return (
        f'<section><h2>{_text(layer.layer)}</h2><p class="soft">{facts}</p>\n'
        f"<table><thead><tr>{head}<th>experts</th></tr></thead><tbody>\n"
        f'{"".join(rows)}</tbody></table>\n<p class="soft">Taken away at all positions at once:</p>'
        f'<div class="chips">{totals}</div></section>\n'
    )


def _chip(slot: Slot, strongest: float) -> str:
    title = f"expert {expert_name(slot)}: gate {slot.gate:.4f}, contribution {slot.contribution:+z.4f} nats"
    return _coloured(slot, strongest, title, f"--gate:{slot.gate:.4f};")


def _total(total: ExpertTotal, strongest: float) -> str:
    chosen = f"chosen at {total.positions} position{'s' if total.positions > 1 else ''}"
    title = f"expert {expert_name(total)}: {chosen}, contribution {total.contribution:+z.4f} nats"
    return _coloured(total, strongest, title, "")


def _coloured(expert: Slot | ExpertTotal, strongest: float, title: str, style: str) -> str:
    # The root makes small contributions visible beside large ones.
    share = min(1.0, abs(expert.contribution) / strongest) ** 0.5 if strongest else 0.0
    kind = "gain" if expert.contribution >= 0 else "loss"
    return (
        f'<span class="chip {kind}" style="{style}--strength:{100 * share:.0f}%" title="{title}">'
        f"<b>{expert_name(expert)}</b>{expert.contribution:+z.3f}</span>"
    )


def _text(text: str) -> str:
    """Any text as text of the page."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))
