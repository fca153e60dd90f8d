"""Make text from any source safe to print on a terminal, and print the figures of gates, one layer per line."""

import errno
import re
import time
from collections.abc import Callable, Mapping

# All control characters (C0, DEL, C1) except tab and line feed. With them, text could move the cursor, hide earlier
# output, or rename the window.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# How long to wait for the signal that a terminal is gone.
_SIGNAL_SECONDS = 1.0

LayerFigures = Mapping[str, Mapping[str, float]]
"""The figures of each MoE layer's gate, as in a line of metrics. Each kind of gate has the figures that apply to it."""


def printable(text: str) -> str:
    """Return `text` with every control character, except tab and line feed, replaced by U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def written(write: Callable[[], object]) -> None:
    """Write something that may go to a terminal, and flush it.

    When a connection drops, the first write that fails can come a moment before the signal of it (SIGHUP). This
    function waits for the signal and writes again. So training can note the signal, and save, instead of failing.
    """
    try:
        write()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        time.sleep(_SIGNAL_SECONDS)
        write()


def layer_lines(layers: LayerFigures) -> list[str]:
    """Return a line with the figures of each MoE layer, to print below a line of metrics."""
    lines = []
    for layer, gate in layers.items():
        text = (
            f"  {layer}  CV(importance) {gate['cv_importance']:.2f}, CV(load) {gate['cv_load']:.2f}, max/mean load "
            f"{gate['max_over_mean_load']:.2f}, entropy {gate['gate_entropy']:.2f}, idle {gate['idle_experts']:.0f}"
        )
        if "noise_std" in gate:
            text += f", noise {gate['noise_std']:.2f}"
        if "max_over_mean_process" in gate:
            text += f", max/mean process {gate['max_over_mean_process']:.2f}"
        if "tokens_without_experts" in gate:
            text += f", tokens without experts {gate['tokens_without_experts']:.1%}"
        lines.append(text)
    return lines


def summary(layers: LayerFigures) -> str:
    """Return the figures of the worst layer, for the end of a line with a progress bar; "" without MoE layers."""
    if not layers:
        return ""
    idle = sum(gate["idle_experts"] for gate in layers.values())
    if all("tokens_without_experts" in gate for gate in layers.values()):
        # These gates always have even load; the number of experts per token may be uneven.
        worst = max(layers, key=lambda layer: layers[layer]["tokens_without_experts"])
        return f"; {layers[worst]['tokens_without_experts']:.1%} without experts {worst}, idle {idle:.0f}"
    worst = max(layers, key=lambda layer: layers[layer]["cv_load"])
    return f"; worst CV(load) {layers[worst]['cv_load']:.2f} {worst}, idle {idle:.0f}"
