"""Names of the network's parameters, in its modules and in checkpoints.

"encoder.moe_layers.moe.2.experts.weights.0" is the first matrix of all experts of the layer "encoder.2". Its name
within that layer is "experts.weights.0". Letters: E experts.
"""

from collections.abc import Iterable
from typing import NamedTuple

from nmt.config import PARTS, LayerName

_EXPERT = "experts.weights."
EMBEDDING = "target_embedding.weight"
TIED = (EMBEDDING, "source_embedding.weight", "output.weight")
"""Names of the matrices with a row per subword. In a tied network, they are one parameter, with the first name."""
PIECE_ROWS = (*TIED, "output.bias")
"""Names of all parameters with a row per subword of the vocabulary."""
_DIM_OF_GATE = {"gate.threshold_E": 0, "gate.w_gate_DE": 1, "gate.w_noise_DE": 1, "gate.bias_E": 0}


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


class Part(NamedTuple):
    """The part of the network to which a parameter belongs."""

    kind: str
    """One of `nmt.config.PARTS` except encoder and decoder, which are places; "others" for unknown parameters."""
    place: str
    """LSTM or MoE layer, such as "encoder.2"; "encoder" or "decoder" alone for what is in no layer; else empty."""

    @classmethod
    def of(cls, name: str) -> "Part":
        """Return the part of the parameter `name` of the network."""
        side, *inner = name.split(".")
        match inner:
            case ["moe_layers", "moe", place, *_]:
                return cls("experts" if is_expert(name) else "gates", f"{side}.{place}")
            case ["bottom", *_]:
                return cls("lstms", f"{side}.1")
            case ["upper", number, *_]:
                return cls("lstms", f"{side}.{int(number) + 2}")
            case ["attention" | "context", *_]:
                return cls("attention", side)
        if name in PIECE_ROWS:
            return cls("softmax" if side == "output" else "embeddings", "")
        return cls("others", side)

    def belongs_to(self, part: str) -> bool:
        """Whether this is in a part of `nmt.config.PARTS`. Neither gates nor experts belong to encoder or decoder."""
        within = self.place.partition(".")[0] == part and self.kind not in ("gates", "experts")
        return within or self.kind == part


def summary(names: Iterable[str]) -> str:
    """Return the parts of these parameters in words: "softmax; gates and experts of encoder.2, decoder.1"."""
    places: dict[str, list[str]] = {}
    for kind, place in sorted({Part.of(name) for name in names}, key=_order):
        places.setdefault(kind, []).append(place)
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, found in places.items():
        kinds.setdefault(tuple(place for place in found if "." in place), []).append(kind)
    told = ((" and ".join(each).replace("lstms", "LSTMs"), ", ".join(found)) for found, each in kinds.items())
    return "; ".join(f"{each} of {found}" if found else each for each, found in told)


def _order(part: Part) -> tuple[int, bool, int]:
    """Return the key by which parts are in the order of `PARTS`, and layers in the order of the network."""
    side, _, number = part.place.partition(".")
    return (*PARTS, "others").index(part.kind), side == "decoder", int(number or 0)
