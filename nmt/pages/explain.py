"""An explanation as a self-contained HTML page, light or dark like the reader's system.

A chip is an expert. Its width is the gate and its colour the contribution: blue if the translation would be less
probable without it, orange if it would be more probable. The page is also well-formed XML.
"""

from nmt.config import LayerName
from nmt.data.subwords import BLANK_SIGN, END_SIGN, readable
from nmt.experts.explain import ExpertTotal, Explanation, LayerExplanation, Slot, expert_name
from nmt.pages.charts import weight_map
from nmt.pages.document import document, text
from nmt.pages.style import CHARTS, EXPLANATION
from nmt.wording import counted

_MEANING = """
The contribution of an expert at a position is the log-probability of the translation, minus its log-probability when
the term g<sub>i</sub> E<sub>i</sub>(x) is left out of that layer's sum (before its sigmoid, if it has one) at that one
position. The layer's other gates do not change; everything that depends on the sum is computed again. Contributions are
exact, not estimated, and their unit is the nat. Positive (blue) means that the translation would be less probable
without this expert there. Contributions do not add up. An encoder position reads its subword. A decoder position reads
the subword before and predicts its own.
"""

_ROUNDING = {"bf16": ", which rounds contributions by a few hundredths of a nat (decoding.precision=fp32 is finer)"}


def explanation_page(explanation: Explanation) -> str:
    """Return the whole page."""
    facts = {
        "source": f"<bdi>{text(explanation.sentence)}</bdi>",
        "translation": f"<bdi>{text(explanation.translation)}</bdi>",
        "log-probability": f"{explanation.log_probability:z.3f} nats, "
        f"{counted(len(explanation.target_pieces), 'subword')}",
        "computed in": explanation.precision + _ROUNDING.get(explanation.precision, ""),
    }
    listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts.items())
    layers = "".join(_layer(explanation, layer) for layer in explanation.layers)
    body = (
        f"<h1>What each expert contributes to this translation</h1><dl>{listed}</dl>\n<p>{_MEANING}</p>\n"
        f'<p class="legend"><span>less probable with it <span class="ramp"></span> more probable with it</span>'
        f"<span>width of a chip: its gate, and never less than its text</span>"
        f"<span>in a chip: expert, contribution</span>"
        f"<span>{BLANK_SIGN}: a blank; {END_SIGN}: the end of the sentence</span></p>\n"
        f"{layers}{_attention(explanation)}"
    )
    return document(f"Experts: {explanation.sentence}", body, CHARTS, EXPLANATION)


def _attention(explanation: Explanation) -> str:
    """Return the section with the attention; nothing if there is none."""
    if not explanation.attention:
        return ""
    rows = [readable(piece) for piece in explanation.target_pieces[: len(explanation.attention)]]
    columns = [readable(piece) for piece in explanation.source_pieces]
    return (
        '<section><h2>Attention</h2><p class="soft">Where each subword of the translation (row) was read from in the '
        "source (column). A row sums to 1, which is the full colour.</p>\n"
        f'<div class="map">{weight_map(rows, columns, explanation.attention, "attention")}</div></section>\n'
    )


def _layer(explanation: Explanation, layer: LayerExplanation) -> str:
    strongest = max((abs(slot.contribution) for slots in layer.positions for slot in slots), default=0.0)
    decoder = LayerName.of(layer.layer).side == "decoder"
    rows = []
    for place, (piece, slots) in enumerate(zip(explanation.pieces_of(layer), layer.positions, strict=True)):
        chips = "".join(_chip(slot, strongest) for slot in slots) or '<span class="soft">no expert</span>'
        number = f'<td class="number">{explanation.piece_log_probabilities[place]:z.2f}</td>' if decoder else ""
        rows.append(
            f'<tr><td class="place">{place}</td><td class="piece"><bdi>{text(readable(piece))}</bdi></td>{number}'
            f'<td><div class="chips">{chips}</div></td></tr>\n'
        )
    totals = "".join(_total(each, strongest) for each in layer.experts) or '<span class="soft">none was chosen</span>'
    head = "<th></th><th>predicts</th><th>log P</th>" if decoder else "<th></th><th>reads</th>"
    facts = f"{layer.num_experts} experts, {len(layer.experts)} of them chosen here; full colour: {strongest:.3f} nats"
    if any(each.group is not None for each in layer.experts):
        facts += "; in a chip: group/expert"
    return (
        f'<section><h2>{text(layer.layer)}</h2><p class="soft">{facts}</p>\n'
        f"<table><thead><tr>{head}<th>experts</th></tr></thead><tbody>\n"
        f'{"".join(rows)}</tbody></table>\n<p class="soft">Removed at all positions at once:</p>'
        f'<div class="chips">{totals}</div></section>\n'
    )


def _chip(slot: Slot, strongest: float) -> str:
    title = f"expert {expert_name(slot)}: gate {slot.gate:.4f}, contribution {slot.contribution:+z.4f} nats"
    return _coloured(slot, strongest, title, f"--gate:{slot.gate:.4f};")


def _total(total: ExpertTotal, strongest: float) -> str:
    chosen = f"chosen at {counted(total.positions, 'position')}"
    title = f"expert {expert_name(total)}: {chosen}, contribution {total.contribution:+z.4f} nats"
    return _coloured(total, strongest, title, "")


def _coloured(expert: Slot | ExpertTotal, strongest: float, title: str, style: str) -> str:
    # The square root keeps small contributions visible beside large ones.
    share = min(1.0, abs(expert.contribution) / strongest) ** 0.5 if strongest else 0.0
    kind = "gain" if expert.contribution >= 0 else "loss"
    return (
        f'<span class="chip {kind}" style="{style}--strength:{100 * share:.0f}%" title="{title}">'
        f"<b>{expert_name(expert)}</b>{expert.contribution:+z.3f}</span>"
    )
