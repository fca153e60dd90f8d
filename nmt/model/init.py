"""Set the initial values of all parameters of the network.

The papers only specify zero gates (S17 appendix A). Initial values affect early quality more than any other choice
measured on this model: see docs/results/studies.md.

| parameter                          | start                          | why                                            |
|------------------------------------|--------------------------------|------------------------------------------------|
| embeddings, softmax weight         | normal, std D^-1/2             | logits of unit scale; embeddings are read      |
|                                    |                                | times D^1/2, or the LSTMs start nearly dead    |
| LSTM matrices                      | uniform, +-1/sqrt(cells)       | PyTorch's and cuDNN's custom                   |
| LSTM biases                        | 0; forget gate 1 in total      | memory from the first step                     |
| attention projections              | Xavier uniform                 | tanh starts in its linear part                 |
| attention v                        | uniform, variance heads/N      | scores of unit scale: the softmax starts open  |
| attention gain, bias (normalised)  | N^-1/2, 0                      | Bahdanau's normalised form as in GNMT v2       |
| context projection (parallel)      | Xavier uniform                 | keeps the scale of the encoder                 |
| expert, all layers but the last    | normal, variance 2/inputs      | He: the ReLU keeps the variance                |
| expert, last layer                 | normal, variance 1/inputs      | outputs of unit scale before the gate weights  |
| noisy gates                        | 0                              | all experts equally likely (S17 appendix A)    |
| gates without noise: w_gate        | normal, std D^-1/2             | logits of unit scale; nothing else breaks ties |
| strictly balanced: thresholds      | log T = -log E                 | value of every gate if all are equal           |
| output bias                        | 0                              | -                                              |
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from nmt.model.attention import Attention
from nmt.model.experts import Experts
from nmt.model.gating import THRESHOLD_SCALE, Gate, StrictlyBalancedGate
from nmt.model.lstm import LSTM


@torch.no_grad()
def init_parameters(model: nn.Module, softmax: nn.Linear) -> None:
    """Set every parameter of `model` to its initial value in the table; `softmax` is the output layer of `model`."""
    for module in model.modules():
        match module:
            case nn.Embedding():
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            case nn.Linear():
                nn.init.xavier_uniform_(module.weight)
            case LSTM():
                _init_lstm(module.lstm)
            case Attention():
                _init_scores(module)
            case Experts():
                _init_experts(module)
            case Gate():
                _init_gate(module)
    nn.init.normal_(softmax.weight, std=softmax.in_features**-0.5)
    if softmax.bias is not None:
        nn.init.zeros_(softmax.bias)


def _init_experts(experts: Experts) -> None:
    """Draw every expert from its own seed, so that it is the same in any process and with any share of experts."""
    for place, w_EIO in enumerate(experts.weights, start=1):
        if w_EIO.is_meta:  # created only to count parameters
            continue
        std = ((2.0 if place < len(experts.weights) else 1.0) / w_EIO.shape[1]) ** 0.5
        seed = int(torch.randint(2**62, (), device="cpu"))
        drawn = [
            (w_IO, torch.Generator(w_IO.device).manual_seed(seed + number))
            for number, w_IO in enumerate(w_EIO.detach(), start=experts.first)
        ]
        # Threads, since there may be billions of weights and each generator draws on a single thread.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda each, std=std: nn.init.normal_(each[0], std=std, generator=each[1]), drawn))


def _init_lstm(lstm: nn.LSTM) -> None:
    bound = lstm.hidden_size**-0.5
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)
        # PyTorch's order of gates: input, forget, cell, output. Only one of the two bias vectors has the 1.
        if name.startswith("bias_hh"):
            parameter[lstm.hidden_size : 2 * lstm.hidden_size] = 1.0


def _init_gate(gate: Gate) -> None:
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    if not gate.noisy:
        nn.init.normal_(gate.w_gate_DE, std=gate.w_gate_DE.shape[0] ** -0.5)
    if isinstance(gate, StrictlyBalancedGate):
        nn.init.constant_(gate.threshold_E, -math.log(gate.num_experts) / THRESHOLD_SCALE)


def _init_scores(attention: Attention) -> None:
    size = attention.v_N.numel()
    bound = (3.0 * attention.heads / size) ** 0.5
    nn.init.uniform_(attention.v_N, -bound, bound)
    if attention.function == "normalised":
        nn.init.constant_(attention.gain, size**-0.5)
        nn.init.zeros_(attention.bias_N)
