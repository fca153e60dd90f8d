"""The translator network: embeddings, encoder, decoder with attention, softmax (S17 appendix E, GNMT section 3).

Encoder: embedding, LSTM 1, LSTM 2, MoE, LSTM 3. Decoder: embedding, LSTM 1 with attention, MoE, LSTM 2, softmax. The
numbers of layers and the places of MoE layers are configurable. Each layer's output goes through dropout. If the layer
has a residual connection, its input is added.

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
    """State of the decoder between two positions."""

    lstm: tuple[LSTMState, ...]
    query_1RD: Tensor  # output of decoder layer 1, the next query of the feedback wirings

    def select(self, columns_R: Tensor) -> "DecoderState":
        """Return the state of these columns, such as surviving hypotheses or unfinished sentences."""
        lstm = tuple((h.index_select(1, columns_R), c.index_select(1, columns_R)) for h, c in self.lstm)
        return DecoderState(lstm, self.query_1RD.index_select(1, columns_R))


class DecoderOutput(NamedTuple):
    """Output of a pass: `x_TRD` is the input of the softmax layer, `weights_TRS` the attention."""

    x_TRD: Tensor
    weights_TRS: Tensor
    state: DecoderState
    gates: Gates  # of the whole pass; `Decoder.walk` leaves it empty


class LossOutput(NamedTuple):
    """Losses, float32 sums over the batch's target tokens, and the gates of the pass."""

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
        """Return x after the MoE layer that follows LSTM `layer`, or x itself if none does.

        Gates get only the rows `rows_N` (None: all), which leave out padding. In a batch that `fit` padded, some of
        these rows are padding: `real_N` is False there (None: all are real).
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
    """Stacked LSTMs over the source; the bottom one can be bidirectional."""

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
        """Return top_SBD for the embedded source; values at padding positions are unspecified."""
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
        # A layer with different input and output widths (after GNMT's full bidirectional one) has no residual.
        return x_SBD + y_SBD if layer >= self.residual_from and x_SBD.shape == y_SBD.shape else y_SBD


class Decoder(nn.Module):
    """Stacked LSTMs over the target. Layer 1 gives the attention's queries (wirings: `AttentionConfig.wiring`)."""

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
        """Decode T positions of R columns; column r belongs to sentence r mod B of `memory`."""
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
        # Hypotheses of a sentence are more queries to the same memory, so a beam needs no copies of it.
        num_positions, columns, width = query_TRD.shape
        sentences = memory.values_SBD.shape[1]
        context, weights = self.attention(query_TRD.reshape(-1, sentences, width), memory)
        return context.reshape(query_TRD.shape), weights.reshape(num_positions, columns, -1)

    def _feedback_bottom(
        self, x_TRD: Tensor, memory: Memory, state: DecoderState | None
    ) -> tuple[Tensor, Tensor, Tensor, LSTMState]:
        """Run layer 1 position by position; its input is the next token and the context of its previous output.

        Returns (outputs, contexts, attention weights, state of the LSTM).
        """
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
    """The whole network for a shared vocabulary of V subwords, with all experts or a share of them.

    With a share, the other experts need another dispatcher: see `nmt.parallel.expert_parallel.make_model`.

    Arguments of several methods: `experts_per_token` is the number of active experts per token in a pass outside
    training, 0 for as many as in training. `change_gate` can change the decisions of a gate, see `ChangeGate`.
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
        """Return the memory that the decoder reads, and the gates. `rows_N`: positions of real tokens as in `Batch`."""
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
        """Decode T positions, starting from `state`: the whole target in training, one position in a search."""
        x_TRD = self._embed(self.target_embedding, target_TR)
        walk = self.decoder.walk(x_TRD, memory, state, rows_N)
        (decoded,), gates = walk_together([walk], experts_per_token, change_gate=change_gate)
        return decoded._replace(gates=gates)

    def moe_layers(self) -> dict[str, MoE]:
        """Return the MoE layers by name, in the order in which a token passes them."""
        layers = {}
        for name in self.config.moe_layer_names():
            moe = self.get_submodule(layer_prefix(name)[:-1])
            assert isinstance(moe, MoE)
            layers[name] = moe
        return layers

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights of matrix products, except in gates and the softmax layer."""
        return self.decoder.attention.query.weight.dtype

    def logits(self, x: Tensor) -> Tensor:
        """Return `output_logits` of this model's softmax layer."""
        return output_logits(x, self.output.weight, self.output.bias)

    def forward(self, *bands: Batch, label_smoothing: float = 0.0, experts_per_token: int = 0) -> LossOutput:
        """Return the summed loss of predicting every target token from the source and the target tokens before it.

        Several batches give the loss of one batch of all their sentences, with less padding: see nmt/model/walk.py.
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
        """Return the gates that `forward` would return, without computing anything after the last gate."""
        layers = self.config.moe_layer_names()
        if not layers:
            return {}
        return walk_together([self._reading(batch) for batch in bands], experts_per_token, last=layers[-1])[1]

    def check_experts_per_token(self, count: int) -> None:
        """Raise ValueError if a layer cannot activate `count` experts per token; 0 (as in training) is always valid."""
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
        # LSTMs get inputs of unit scale, while the matrix keeps the scale that the softmax needs.
        x_LRD = F.embedding(ids_LR, embedding.weight) * self.config.hidden_size**0.5
        autocast = torch.is_autocast_enabled(x_LRD.device.type)
        return self.dropout(x_LRD.to(torch.get_autocast_dtype(x_LRD.device.type) if autocast else self.dtype))
