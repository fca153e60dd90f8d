"""Build models from existing tensors, without random numbers and without needless copies."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmt.config import ModelConfig
from nmt.model.experts import ALL_EXPERTS, ExpertShard
from nmt.model.lstm import LSTM
from nmt.model.seq2seq import Seq2Seq


class _NothingDrawn(TorchFunctionMode):
    """Context in which the functions of torch.nn.init do nothing.

    Parameters without memory need no values, and drawing on the meta device would load PyTorch's compiler, which takes
    a second.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return keywords["tensor"] if "tensor" in keywords else args[0]
        return function(*args, **keywords)


def skeleton(config: ModelConfig, vocab_size: int, share: ExpertShard = ALL_EXPERTS) -> Seq2Seq:
    """Return the network with its parameters on the meta device, without memory."""
    with torch.device("meta"), _NothingDrawn():
        return Seq2Seq(config, vocab_size, share)


def assemble(
    config: ModelConfig, vocab_size: int, tensors: Mapping[str, Tensor], share: ExpertShard = ALL_EXPERTS
) -> Seq2Seq:
    """Return the network with these tensors as parameters, in evaluation mode.

    `tensors` has every name of `named_parameters`. A tied matrix has its first name there. If `tensors` has its other
    name too, that tensor is used at the other place.
    """
    model = skeleton(config, vocab_size, share)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    made = {name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for name, tensor in tensors.items()}
    state = {
        name: made[name if name in made else first[id(parameter)]]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        if isinstance(module, LSTM):
            module.lay_out()
    return model.eval()
