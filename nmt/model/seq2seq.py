"""The translator network: embeddings, encoder, decoder with attention, softmax (S17 appendix E, GNMT section 3).

Encoder: embedding, LSTM 1, LSTM 2, MoE, LSTM 3. Decoder: embedding, LSTM 1 with attention, MoE, LSTM 2, softmax. Every
number in that sentence is configuration. Each layer's output goes through dropout and, where there is a residual
connection, is added to the layer's input.

Letters: S source positions, T target positions, B sentences, R = hypotheses x B decoder columns (training: R = B),
D width, V vocabulary, N real (not padding) positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.batch import Batch
from nmt.config import LayerName, ModelConfig
from nmt.model.attention import Attention, Memory
from nmt.model.experts import ALL_EXPERTS, ExpertShard, MoE
from nmt.model.init import init_parameters
from nmt.model.loss import linear_cross_entropy, output_logits
from nmt.model.lstm import LSTM, BidirectionalLSTM, LSTMState
from nmt.model.names import layer_prefix
from nmt.model.rows import put_rows, take_rows
from nmt.model.walk import ChangeGate, Gates, Visit, Walk, real_of_all, walk_together


class DecoderState(NamedTuple):
    """What the decoder carries from one position to the next."""

    lstm: tuple[LSTMState, ...]
    query_1RD: Tensor  # output of decoder layer 1, the next query of the feedback wirings

    def select(self, columns_R: Tensor) -> "DecoderState":
        """The state of these columns: hypotheses that survive, sentences that are not finished."""
        lstm = tuple((h.index_select(1, columns_R), c.index_select(1, columns_R)) for h, c in self.lstm)
        return DecoderState(lstm, self.query_1RD.index_select(1, columns_R))


class DecoderOutput(NamedTuple):
    """`x_TRD` is what the softmax layer reads; `weights_TRS` the attention."""

    x_TRD: Tensor
    weights_TRS: Tensor
    state: DecoderState
    gates: Gates  # those of the pass; empty on the way


class LossOutput(NamedTuple):
    """Sums over the batch's target tokens (float32), and the gates of the pass."""

    loss: Tensor  # with label smoothing; carries the gradient
    nll: Tensor  # negative log-likelihood, in nats
    gates: Gates


class _MoELayers(nn.Module):
    """The MoE layers of one side, with their dropout and residual."""

    def __init__(self, side: str, places: list[int], config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        places = places if config.moe.num_experts else []
        self.side = side
        counts = {place: config.moe.experts_at(str(LayerName(side, place))) for place in places}
        self.moe = nn.ModuleDict(
            {str(place): MoE(config.hidden_size, count, config.moe, share) for place, count in counts.items()}
        )
        self.dropout = nn.Dropout(config.dropout)

    def after(self, layer: int, x_TBD: Tensor, rows_N: Tensor | None, real_N: Tensor | None) -> Walk[Tensor]:
        """x after the MoE that stands behind LSTM `layer`, if one does.

        Padding never reaches a gate: only rows `rows_N` do (None: all are real). Of these, `real_N` says which are
        padding after all, see `fit` (None: none is).
        """
        if str(layer) not in self.moe:
            return x_TBD
        moe = self.moe[str(layer)]
        assert isinstance(moe, MoE)
        x_MD = x_TBD.flatten(0, 1)
        x_ND = x_MD if rows_N is None else take_rows(x_MD, rows_N)
        y_ND = yield Visit(str(LayerName(self.side, layer)), moe, x_ND, real_N)
        y_MD = y_ND if rows_N is None else put_rows(y_ND, rows_N, x_MD.shape[0])
        return x_TBD + self.dropout(y_MD).view_as(x_TBD)


class Encoder(nn.Module):
    """Stacked LSTMs over the source, the bottom one in both directions if so configured."""

    def __init__(self, config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        width, cells = config.hidden_size, config.cell_size
        self.residual_from = config.residual_from
        bottom = LSTM if config.bottom_layer == "forward" else BidirectionalLSTM
        self.bottom: LSTM | BidirectionalLSTM = bottom(width, *config.bottom_direction())
        second = 2 * width if config.bottom_layer == "bidirectional_full" else width
        self.upper = nn.ModuleList(
            LSTM(second if layer == 2 else width, cells, width) for layer in range(2, config.num_encoder_layers + 1)
        )
        self.moe_layers = _MoELayers("encoder", config.encoder_moe_after, config, share)
        self.dropout = nn.Dropout(config.dropout)

    def walk(self, x_SBD: Tensor, length_B: Tensor, rows_N: Tensor | None, real_N: Tensor | None) -> Walk[Tensor]:
        """top_SBD of embedded source; padding positions come out unspecified."""
        if isinstance(self.bottom, BidirectionalLSTM):
            y_SBD = self.bottom(x_SBD, length_B)
        else:
            y_SBD, _ = self.bottom(x_SBD)
        x_SBD = self._residual(1, x_SBD, self.dropout(y_SBD))
        x_SBD = yield from self.moe_layers.after(1, x_SBD, rows_N, real_N)
        for layer, lstm in enumerate(self.upper, start=2):
            y_SBD, _ = lstm(x_SBD)
            x_SBD = self._residual(layer, x_SBD, self.dropout(y_SBD))
            x_SBD = yield from self.moe_layers.after(layer, x_SBD, rows_N, real_N)
        return x_SBD

    def _residual(self, layer: int, x_SBD: Tensor, y_SBD: Tensor) -> Tensor:
        # A layer whose output is not as wide as its input (GNMT's full bidirectional one) has no residual.
        return x_SBD + y_SBD if layer >= self.residual_from and x_SBD.shape == y_SBD.shape else y_SBD


class Decoder(nn.Module):
    """Stacked LSTMs over the target; layer 1 asks the attention (wirings: `AttentionConfig.wiring`)."""

    def __init__(self, config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        width, cells = config.hidden_size, config.cell_size
        self.attention_config = config.attention
        self.residual_from = config.residual_from
        self.bottom = LSTM(2 * width if self.attention_config.feeds_back else width, cells, width)
        above = 2 * width if self.attention_config.context_above else width
        self.upper = nn.ModuleList(LSTM(above, cells, width) for _ in range(config.num_decoder_layers - 1))
        self.attention = Attention(width, config.attention)
        if self.attention_config.projects_context:
            self.context = nn.Linear(width, width, bias=False)
        self.moe_layers = _MoELayers("decoder", config.decoder_moe_after, config, share)
        self.dropout = nn.Dropout(config.dropout)

    def walk(
        self,
        x_TRD: Tensor,
        memory: Memory,
        state: DecoderState | None,
        rows_N: Tensor | None,
        real_N: Tensor | None = None,
    ) -> Walk[DecoderOutput]:
        """T positions of R columns at once; column r belongs to sentence r mod B of `memory`."""
        lstm_states = state.lstm if state else (None,) * (1 + len(self.upper))
        if self.attention_config.feeds_back:
            x_TRD, context_TRD, weights_TRS, first = self._feedback_bottom(x_TRD, memory, state)
        else:
            y_TRD, first = self.bottom(x_TRD, lstm_states[0])
            x_TRD = self._residual(1, x_TRD, self.dropout(y_TRD))
            context_TRD, weights_TRS = self._attend(x_TRD, memory)
        query_1RD = x_TRD[-1:]
        if self.attention_config.projects_context:
            x_TRD = x_TRD + self.dropout(self.context(context_TRD))
        x_TRD = yield from self.moe_layers.after(1, x_TRD, rows_N, real_N)
        states = [first]
        for layer, lstm in enumerate(self.upper, start=2):
            input_TRD = torch.cat([x_TRD, context_TRD], dim=2) if self.attention_config.context_above else x_TRD
            y_TRD, after = lstm(input_TRD, lstm_states[layer - 1])
            states.append(after)
            x_TRD = self._residual(layer, x_TRD, self.dropout(y_TRD))
            x_TRD = yield from self.moe_layers.after(layer, x_TRD, rows_N, real_N)
        return DecoderOutput(x_TRD, weights_TRS, DecoderState(tuple(states), query_1RD), {})

    def _attend(self, query_TRD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        # Hypotheses of a sentence are further queries to the same memory, so it is never copied for a beam.
        num_positions, columns, width = query_TRD.shape
        sentences = memory.values_SBD.shape[1]
        context, weights = self.attention(query_TRD.reshape(-1, sentences, width), memory)
        return context.reshape(query_TRD.shape), weights.reshape(num_positions, columns, -1)

    def _feedback_bottom(
        self, x_TRD: Tensor, memory: Memory, state: DecoderState | None
    ) -> tuple[Tensor, Tensor, Tensor, LSTMState]:
        """Layer 1 position by position: its previous output asks, the answer enters with the next token."""
        lstm_state = state.lstm[0] if state else None
        query_1RD = state.query_1RD if state else torch.zeros_like(x_TRD[:1])
        outputs, contexts, weights = [], [], []
        of_lstm = self.bottom.weights()
        for x_RD in x_TRD:
            context_1RD, weights_1RS = self._attend(query_1RD, memory)
            x_1RD = x_RD.unsqueeze(0)
            y_1RD, lstm_state = self.bottom(torch.cat([x_1RD, context_1RD.to(x_1RD.dtype)], 2), lstm_state, of_lstm)
            query_1RD = self._residual(1, x_1RD, self.dropout(y_1RD))
            outputs.append(query_1RD)
            contexts.append(context_1RD)
            weights.append(weights_1RS)
        assert lstm_state is not None
        return torch.cat(outputs), torch.cat(contexts), torch.cat(weights), lstm_state

    def _residual(self, layer: int, x_TRD: Tensor, y_TRD: Tensor) -> Tensor:
        return x_TRD + y_TRD if layer >= self.residual_from else y_TRD


class Seq2Seq(nn.Module):
    """The whole network for a shared vocabulary of V pieces; of its experts, a share.

    A share of experts needs a dispatcher that reaches the others: `nmt.parallel.expert_parallel.make_model`.
    `experts_per_token` of its methods: how many experts each token wakes in a pass outside training; 0 means as many
    as in training.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, share: ExpertShard = ALL_EXPERTS) -> None:
        super().__init__()
        self.config, self.share = config, share
        width = config.hidden_size
        self.target_embedding = nn.Embedding(vocab_size, width)
        self.source_embedding = self.target_embedding if config.tie_embeddings else nn.Embedding(vocab_size, width)
        self.output = nn.Linear(width, vocab_size, bias=config.output_bias)
        if config.tie_embeddings:
            self.output.weight = self.target_embedding.weight
        self.encoder = Encoder(config, share)
        self.decoder = Decoder(config, share)
        self.dropout = nn.Dropout(config.dropout)
        init_parameters(self, self.output)

    def encode(
        self,
        source_SB: Tensor,
        length_B: Tensor,
        rows_N: Tensor | None,
        experts_per_token: int = 0,
        change_gate: ChangeGate | None = None,
    ) -> tuple[Memory, Gates]:
        """The memory that the decoder reads. `rows_N`: flat positions of real tokens, see `Batch`."""
        walk = self._encoding(source_SB, length_B, rows_N)
        (memory,), gates = walk_together([walk], experts_per_token, change_gate=change_gate)
        return memory, gates

    def decode(
        self,
        target_TR: Tensor,
        memory: Memory,
        state: DecoderState | None = None,
        rows_N: Tensor | None = None,
        experts_per_token: int = 0,
        change_gate: ChangeGate | None = None,
    ) -> DecoderOutput:
        """The decoder over T positions, from `state` on: the whole target in training, one position in a search."""
        x_TRD = self._embed(self.target_embedding, target_TR)
        walk = self.decoder.walk(x_TRD, memory, state, rows_N)
        (decoded,), gates = walk_together([walk], experts_per_token, change_gate=change_gate)
        return decoded._replace(gates=gates)

    def moe_layers(self) -> dict[str, MoE]:
        """The MoE layers by name, in the order in which a token meets them."""
        layers = {}
        for name in self.config.moe_layer_names():
            moe = self.get_submodule(layer_prefix(name)[:-1])
            assert isinstance(moe, MoE)
            layers[name] = moe
        return layers

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights of matrix products, gates and softmax layer left out."""
        return self.decoder.attention.query.weight.dtype

    def logits(self, x: Tensor) -> Tensor:
        """`output_logits` with the softmax layer of this model."""
        return output_logits(x, self.output.weight, self.output.bias)

    def forward(self, *bands: Batch, label_smoothing: float = 0.0, experts_per_token: int = 0) -> LossOutput:
        """Summed loss of predicting every target token from the source and the tokens before it.

        Several batches are one batch of sentences of several lengths, without the padding: see nmt/model/walk.py.
        """
        decoded, gates = walk_together([self._reading(batch) for batch in bands], experts_per_token)
        x_ND = torch.cat(
            [
                take_rows(each.x_TRD.flatten(0, 1), batch.target_rows_N)
                for each, batch in zip(decoded, bands, strict=True)
            ]
        )
        target_N = torch.cat([batch.target_out_TB.flatten().index_select(0, batch.target_rows_N) for batch in bands])
        real_N = real_of_all([batch.real_target_rows for batch in bands], [batch.target_rows_N for batch in bands])
        loss, nll = linear_cross_entropy(x_ND, self.output.weight, self.output.bias, target_N, label_smoothing, real_N)
        return LossOutput(loss, nll, gates)

    def gates(self, *bands: Batch, experts_per_token: int = 0) -> Gates:
        """The gates that `forward` would return; nothing beyond the last of them is computed."""
        layers = self.config.moe_layer_names()
        if not layers:
            return {}
        return walk_together([self._reading(batch) for batch in bands], experts_per_token, last=layers[-1])[1]

    def check_experts_per_token(self, count: int) -> None:
        """ValueError if not every layer can wake `count` experts for each token; 0: as many as in training."""
        for moe in self.moe_layers().values():
            moe.gate.check_experts_per_token(count)

    def _reading(self, batch: Batch) -> Walk[DecoderOutput]:
        source = batch.source_SB, batch.source_length_B, batch.source_rows_N
        memory = yield from self._encoding(*source, batch.real_source_rows)
        x_TBD = self._embed(self.target_embedding, batch.target_in_TB)
        return (yield from self.decoder.walk(x_TBD, memory, None, batch.target_rows_N, batch.real_target_rows))

    def _encoding(
        self, source_SB: Tensor, length_B: Tensor, rows_N: Tensor | None, real_N: Tensor | None = None
    ) -> Walk[Memory]:
        top_SBD = yield from self.encoder.walk(self._embed(self.source_embedding, source_SB), length_B, rows_N, real_N)
        position_S1 = torch.arange(source_SB.shape[0], device=source_SB.device)[:, None]
        return self.decoder.attention.memory(top_SBD, position_S1 >= length_B)

    def _embed(self, embedding: nn.Embedding, ids_LR: Tensor) -> Tensor:
        # Unit scale for what the LSTMs read, while the matrix itself keeps the scale that the softmax wants.
        x_LRD = F.embedding(ids_LR, embedding.weight) * self.config.hidden_size**0.5
        autocast = torch.is_autocast_enabled(x_LRD.device.type)
        return self.dropout(x_LRD.to(torch.get_autocast_dtype(x_LRD.device.type) if autocast else self.dtype))
