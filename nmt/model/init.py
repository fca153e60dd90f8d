"""Every initial value of the network in one place.

The papers give none but the zero gates (S17 appendix A), and the start decides more of the early quality than any other
choice measured on this model: see the README's results.

| parameter                          | start                          | why                                            |
|------------------------------------|--------------------------------|------------------------------------------------|
| embeddings, softmax weight         | normal, std D^-1/2             | logits of unit scale; embeddings are read      |
|                                    |                                | times D^1/2, or the LSTMs start nearly dead    |
| LSTM matrices                      | uniform, +-1/sqrt(cells)       | PyTorch's and cuDNN's custom                   |
| LSTM biases                        | 0; forget gate 1 in all        | memory from the first step                     |
| attention projections              | Xavier uniform                 | tanh starts in its linear part                 |
| attention v                        | uniform, variance 1/N          | scores of unit scale: the softmax starts open  |
| attention gain, bias (normalised)  | N^-1/2, 0                      | Bahdanau's normalised form as in GNMT v2       |
| context projection (parallel)      | Xavier uniform                 | keeps the scale of the encoder                 |
| expert w1                          | normal, variance 2/D           | He: variance kept through the ReLU             |
| expert w2                          | normal, variance 1/H           | outputs of unit scale before the gate weights  |
| gate w_gate, w_noise               | 0                              | all experts equally likely (S17 appendix A)    |
| output bias                        | 0                              | -                                              |
"""

import torch
from torch import nn

from nmt.model.attention import Attention
from nmt.model.experts import Experts
from nmt.model.gating import NoisyTopKGate
from nmt.model.lstm import LSTM


@torch.no_grad()
def init_parameters(model: nn.Module, softmax: nn.Linear) -> None:
    """Set every parameter of `model`, of which `softmax` is the output layer, as the table says."""
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
                _, width, hidden = module.w1_EDH.shape
                nn.init.normal_(module.w1_EDH, std=(2.0 / width) ** 0.5)
                nn.init.normal_(module.w2_EHD, std=hidden**-0.5)
            case NoisyTopKGate():
                nn.init.zeros_(module.w_gate_DE)
                nn.init.zeros_(module.w_noise_DE)
    nn.init.normal_(softmax.weight, std=softmax.in_features**-0.5)
    if softmax.bias is not None:
        nn.init.zeros_(softmax.bias)


def _init_lstm(lstm: nn.LSTM) -> None:
    bound = lstm.hidden_size**-0.5
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)
        # Gates stand in PyTorch's order: input, forget, cell, output. One of the two bias vectors carries the 1.
        if name.startswith("bias_hh"):
            parameter[lstm.hidden_size : 2 * lstm.hidden_size] = 1.0


def _init_scores(attention: Attention) -> None:
    size = attention.v_N.numel()
    bound = (3.0 / size) ** 0.5
    nn.init.uniform_(attention.v_N, -bound, bound)
    if attention.function == "normalised":
        nn.init.constant_(attention.gain, size**-0.5)
        nn.init.zeros_(attention.bias_N)
