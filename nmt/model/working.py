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
from nmt.model.kernels.packed import PackedLinear, PackedLSTM, PackedWeight
from nmt.model.lstm import LSTM
from nmt.model.names import is_expert
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

    If its weights have the right types, this is `model` itself, moved. Else it is a copy in evaluation mode. For bf16,
    the copy computes the same as `model` under autocast, and has each weight in the type of its products, so that no
    pass casts any. `precise_names` stay float32. On a GPU the softmax layer does not: a CPU has no product of bf16
    inputs with float32 results. Experts in bf16 stay as they are on a CPU: products in float32 cast the few that have
    rows, and there may be thousands of others that need not even be read.
    """
    on_gpu, precise = device.type == "cuda", precise_names(model)
    types = {}
    for name, parameter in model.named_parameters():
        in_place = name in precise or (is_expert(name) and not on_gpu and parameter.dtype == torch.bfloat16)
        widened = dtype == torch.float32 and parameter.dtype != torch.bfloat16
        types[name] = parameter.dtype if in_place or widened else dtype
    softmax = model.output.weight
    softmax_type = dtype if on_gpu and dtype == torch.bfloat16 else softmax.dtype
    same = all(parameter.dtype == types[name] for name, parameter in model.named_parameters())
    if same and softmax.dtype == softmax_type:
        return model.to(device)
    tensors = {name: parameter.detach().to(device, types[name]) for name, parameter in model.named_parameters()}
    if softmax.dtype != softmax_type:
        tensors["output.weight"] = softmax.detach().to(device, softmax_type)
    return _sharing(model, tensors)


def types_in_place(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the stored types (F32, BF16) of experts that a CPU uses without a copy for products in `dtype`."""
    return ("F32", "BF16") if dtype == torch.float32 else ("BF16",)


def precise_names(model: Seq2Seq) -> set[str]:
    """Return the names of parameters that stay float32 in a model in bf16.

    These are weights used element by element (embeddings, the attention's vectors), the gates and the softmax layer.
    """
    precise = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Gate | Attention | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name for name, parameter in model.named_parameters() if id(parameter) in precise or name.startswith("output.")
    }


def with_packed_weights(model: Seq2Seq, dtype: torch.dtype) -> Seq2Seq:
    """Return a model for searches on a CPU, whose LSTMs and softmax layer have packed weights of `dtype` as well.

    It shares the parameters of `model`, which may be trained further; packed weights do not follow.
    """
    packed = _sharing(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    for module in packed.modules():
        if isinstance(module, LSTM):
            module.packed = PackedLSTM(module.weights(), dtype)
    packed.packed_output = PackedWeight(packed.output.weight, packed.output.bias, dtype)
    if dtype == torch.int8:
        # The products of every position; a linear layer in bf16 is as fast by itself.
        decoder = packed.decoder
        decoder.attention.query = PackedLinear(decoder.attention.query, dtype)  # type: ignore[assignment]
        if decoder.attention_config.projects_context:
            decoder.context = PackedLinear(decoder.context, dtype)  # type: ignore[assignment]
    return packed


def _sharing(model: Seq2Seq, tensors: dict[str, Tensor]) -> Seq2Seq:
    """Return a model with these parameters, and otherwise like `model`."""
    copy = assemble(model.config, model.output.out_features, tensors, model.share)
    for layer, moe in copy.moe_layers().items():
        original = model.moe_layers()[layer]
        moe.dispatcher, moe.experts.when_woken = original.dispatcher, original.experts.when_woken
    return copy
