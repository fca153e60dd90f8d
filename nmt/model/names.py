"""Names of the network's parameters, as its modules give them and checkpoints keep them.

"encoder.moe_layers.moe.2.experts.weights.0" is the first matrix of all experts of the layer "encoder.2". Within that
layer it is "experts.weights.0". Letters: E experts.
"""

from nmt.config import LayerName

_EXPERT = "experts.weights."
_DIM_OF_GATE = {"gate.threshold_E": 0, "gate.w_gate_DE": 1, "gate.w_noise_DE": 1}


def layer_prefix(layer: str) -> str:
    """What the names of an MoE layer's parameters start with: "encoder.2" -> "encoder.moe_layers.moe.2."."""
    side, place = LayerName.of(layer)
    return f"{side}.moe_layers.moe.{place}."


def expert_matrix(place: int) -> str:
    """Name within an MoE layer of matrix `place`, counted from 0, of all its experts."""
    return f"{_EXPERT}{place}"


def is_expert(name: str) -> bool:
    """Whether a parameter, named in the network or within its MoE layer, belongs to experts: it is (E, ...)."""
    return f".{_EXPERT}" in f".{name}"


def expert_dim(name: str) -> int | None:
    """Which dimension of a parameter, named within its MoE layer, counts the experts; None: none does."""
    return 0 if is_expert(name) else _DIM_OF_GATE.get(name)
