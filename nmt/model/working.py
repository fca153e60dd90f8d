"""Low-precision copies of a model's weights; only this file creates and writes them.

Translation creates the copy once, when it loads a model. Training does not use copies: autocast casts the weights of
dense layers in every micro-batch, and experts are bf16 parameters already, which the optimiser writes
(`nmt/training/optim.py`).
"""

import torch
from torch import Tensor, nn

from nmt.model.assemble import assemble
from nmt.model.attention import Attention
from nmt.model.gating import Gate
from nmt.model.kernels.packed import PackedLSTM, PackedWeight
from nmt.model.lstm import LSTM
from nmt.model.seq2seq import Seq2Seq


class WorkingWeights:
    """The weights of a model in the precision that its products are computed in."""

    def __init__(self, masters: Seq2Seq, device: torch.device, dtype: torch.dtype) -> None:
        """Copy `masters`, without a reference to them: the caller may free them."""
        self.model = _in_precision(masters, device, dtype)
        """Model for passes without gradient, outside autocast."""

    @torch.no_grad()
    def write(self, masters: Seq2Seq) -> None:
        """Copy the values of `masters`, in place; parameters that share their memory need no copy."""
        values = dict(masters.named_parameters(remove_duplicate=False))
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.data_ptr() != values[name].data_ptr():
                parameter.copy_(values[name])


def _in_precision(model: Seq2Seq, device: torch.device, dtype: torch.dtype) -> Seq2Seq:
    """Return the model on `device`, with products in `dtype` outside autocast, for passes without gradient.

    For float32, this is `model` itself, moved. For bf16, it is a copy in evaluation mode that computes the same as
    `model` under autocast. The copy has each weight in the type of its products, so that no pass casts any.
    Three kinds of weights stay float32: those used element by element (embeddings, the attention's vectors), the gates,
    and on a CPU the softmax layer. A CPU has no product of bf16 inputs with float32 results. A model in bf16 is not
    copied again.
    """
    if dtype == torch.float32 or model.dtype == dtype:
        return model.to(device)
    precise = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Gate | Attention | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    tensors = {}
    for name, parameter in model.named_parameters():
        kept = id(parameter) in precise or name.startswith("output.")
        tensors[name] = parameter.detach().to(device, parameter.dtype if kept else dtype)
    if device.type == "cuda":
        tensors["output.weight"] = model.output.weight.detach().to(device, dtype)
    return _sharing(model, tensors)


def with_packed_weights(model: Seq2Seq, dtype: torch.dtype) -> Seq2Seq:
    """Return a model for searches on a CPU, whose LSTMs and softmax layer have packed weights of `dtype` as well.

    It shares the parameters of `model`, which may be trained further; packed weights do not follow.
    """
    packed = _sharing(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    for module in packed.modules():
        if isinstance(module, LSTM):
            module.packed = PackedLSTM(module.weights(), dtype)
    packed.packed_output = PackedWeight(packed.output.weight, packed.output.bias, dtype)
    return packed


def _sharing(model: Seq2Seq, tensors: dict[str, Tensor]) -> Seq2Seq:
    """Return a model with these parameters, and otherwise like `model`."""
    copy = assemble(model.config, model.output.out_features, tensors, model.share)
    for layer, moe in copy.moe_layers().items():
        moe.dispatcher = model.moe_layers()[layer].dispatcher
    return copy
