"""Names of the network's parameters, in its modules and in checkpoints.

"encoder.moe_layers.moe.2.experts.weights.0" is the first matrix of all experts of the layer "encoder.2". Its name
within that layer is "experts.weights.0". Letters: E experts.
"""

from nmt.config import LayerName

_EXPERT = "experts.weights."
_DIM_OF_GATE = {"gate.threshold_E": 0, "gate.w_gate_DE": 1, "gate.w_noise_DE": 1}


def layer_prefix(layer: str) -> str:
    """Return the prefix of the names of an MoE layer's parameters: "encoder.2" -> "encoder.moe_layers.moe.2."."""
    side, place = LayerName.of(layer)
    return f"{side}.moe_layers.moe.{place}."


def expert_matrix(place: int) -> str:
    """Return the name, within an MoE layer, of matrix `place` (from 0) of all its experts."""
    return f"{_EXPERT}{place}"


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to experts, with shape (E, ...); `name` in the network or its MoE layer."""
    return f".{_EXPERT}" in f".{name}"


def expert_dim(name: str) -> int | None:
    """Return the dimension of a parameter, named within its MoE layer, that has size E; None if it has none."""
    return 0 if is_expert(name) else _DIM_OF_GATE.get(name)
