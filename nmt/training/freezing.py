"""Parameters that training leaves as they are (`training.freeze`).

A whole tensor is frozen by taking no gradient for it: the optimiser then has no moments of it, and neither has a
checkpoint. Some experts are frozen within their tensors: before a step, their rows of the gradient become zeros, and so
are their rows of the moments from the start on. A step of Adam, of any kind that nmt.training.optim has, does not
change a weight whose gradient and moments are 0: not even its last bit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nmt.config.parts import expert_slice
from nmt.errors import UserError
from nmt.model.experts import ALL_EXPERTS
from nmt.model.names import Part, is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.wording import brief, percent


class Frozen:
    """The frozen parameters of a model on its device, with its share of the experts.

    A part of `nmt.config.PARTS` freezes the tensors that belong to it (`Part.belongs_to`). A tied matrix belongs to the
    embeddings and to the softmax. "experts[::4]" freezes these experts of every MoE layer. UserError if nothing is left
    to train, or if a slice has no expert.
    """

    def __init__(self, model: Seq2Seq, parts: list[str]) -> None:
        slices = [each for each in map(expert_slice, parts) if each is not None]
        whole = {
            parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if any(Part.of(name).belongs_to(part) for part in parts)
        }
        chosen = {layer: _chosen(moe.num_experts, slices) for layer, moe in model.moe_layers().items()}
        if slices and not any(chosen.values()):
            raise UserError(f"training.freeze=[{', '.join(parts)}]: no MoE layer has experts with these numbers")
        self._rows: dict[str, Tensor] = {}
        """Of matrices with some frozen experts: their places (int64) among the experts of this process."""
        self._parameters = dict(model.named_parameters())
        self._all = self._trained = 0
        for name, parameter in self._parameters.items():
            share = model.share if is_expert(name) else ALL_EXPERTS
            frozen_E = chosen[Part.of(name).place] if is_expert(name) else []
            size = parameter.numel() * share.size
            held = len(parameter) if is_expert(name) else 1
            left = 0 if parameter in whole else size - size // (held * share.size) * len(frozen_E)
            self._all, self._trained = self._all + size, self._trained + left
            # Biases of gates never take a gradient.
            parameter.requires_grad_(left > 0 and parameter.requires_grad)
            places = [each - share.rank * held for each in frozen_E if each // held == share.rank]
            if left and places:
                self._rows[name] = torch.tensor(places, device=parameter.device)
        if not self._trained:
            raise UserError(f"training.freeze=[{', '.join(parts)}] leaves nothing to train: name fewer parts")

    def __str__(self) -> str:
        share = percent(self._trained / self._all)
        return f"training {brief(self._trained)} of {brief(self._all)} parameters ({share}); the others are frozen"

    def clear_gradients(self) -> None:
        """Set the gradients of frozen experts to zero. Waits for nothing, and may be recorded in a CUDA graph."""
        for name, places in self._rows.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                # Filled, not multiplied: the gradient may be NaN.
                gradient.index_fill_(0, places, 0.0)

    def clear_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Set the moments of frozen experts to zero, such as those of a checkpoint before they were frozen.

        `moments` has those of the parameter `name`, by their names.
        """
        for moment in moments.values() if name in self._rows else ():
            if moment.dim():
                moment.index_fill_(0, self._rows[name].to(moment.device), 0.0)


def _chosen(num_experts: int, slices: list[slice]) -> list[int]:
    """Return the numbers, in order, of the experts that are in any of the slices."""
    return sorted({expert for each in slices for expert in range(num_experts)[each]})
