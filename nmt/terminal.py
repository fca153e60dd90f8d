"""Text for a terminal: text from anywhere made harmless, and the figures of gates in a line each."""

import re
from collections.abc import Mapping

# All control characters (C0, DEL, C1) but tab and line feed: with them a text can move the cursor, hide what was
# printed before, or name the window.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

LayerFigures = Mapping[str, Mapping[str, float]]
"""The figures of each MoE layer's gate as a line of metrics has them; a kind of gate has those that mean something."""


def printable(text: str) -> str:
    """`text` with U+FFFD for every control character; a tab and a line feed stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def layer_lines(layers: LayerFigures) -> list[str]:
    """A line of each MoE layer's figures, to stand below a line of metrics."""
    lines = []
    for layer, gate in layers.items():
        text = (
            f"  {layer}  CV(importance) {gate['cv_importance']:.2f}, CV(load) {gate['cv_load']:.2f}, max/mean load "
            f"{gate['max_over_mean_load']:.2f}, entropy {gate['gate_entropy']:.2f}, idle {gate['idle_experts']:.0f}"
        )
        if "noise_std" in gate:
            text += f", noise {gate['noise_std']:.2f}"
        if "tokens_without_experts" in gate:
            text += f", tokens without experts {gate['tokens_without_experts']:.1%}"
        lines.append(text)
    return lines


def summary(layers: LayerFigures) -> str:
    """The end of a line beside a progress bar: the layer that is worst; empty without MoE layers."""
    if not layers:
        return ""
    idle = sum(gate["idle_experts"] for gate in layers.values())
    if all("tokens_without_experts" in gate for gate in layers.values()):
        # Load is always even then; what may be uneven is how many experts a token gets.
        worst = max(layers, key=lambda layer: layers[layer]["tokens_without_experts"])
        return f"; {layers[worst]['tokens_without_experts']:.1%} without experts {worst}, idle {idle:.0f}"
    worst = max(layers, key=lambda layer: layers[layer]["cv_load"])
    return f"; worst CV(load) {layers[worst]['cv_load']:.2f} {worst}, idle {idle:.0f}"
