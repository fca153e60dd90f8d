"""The translator network: embeddings, encoder, decoder with attention, softmax (S17 appendix E, GNMT section 3).

Encoder: embedding, LSTM 1, LSTM 2, MoE, LSTM 3. Decoder: embedding, LSTM 1 with attention, MoE, LSTM 2, softmax. The
numbers of layers and the places of MoE layers are configurable. Each layer's output goes through dropout. If the layer
has a residual connection, its input is added.

Training and scoring run over the whole sentences of a packed batch. A search decodes one position at a time.

Letters: S source positions, B sentences, N rows of a packed side (in the decoder: M target rows, N source rows),
R = hypotheses x B decoder columns of one position, D width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.batch import Batch, Rows
from nmt.config import LayerName, ModelConfig
from nmt.model.attention import Attention, Memory
from nmt.model.dropout import drop_tokens
from nmt.model.experts import ALL_EXPERTS, ExpertShard, MoE
from nmt.model.init import init_parameters
from nmt.model.kernels.packed import PackedWeight
from nmt.model.loss import Lesson, linear_cross_entropy, output_logits, r_drop_cross_entropy, taught_cross_entropy
from nmt.model.lstm import LSTM, BidirectionalLSTM, LSTMState
from nmt.model.names import layer_prefix
from nmt.model.one_pass import ChangeGate, Gates, LastGate, Pass, of_both_passes
from nmt.model.side_by_side import side_by_side


class DecoderState(NamedTuple):
    """State of the decoder between two positions."""

    lstm: tuple[LSTMState, ...]
    query_RD: Tensor | None  # output of decoder layer 1, the next query; None except in the feedback wirings

    def select(self, columns_R: Tensor) -> "DecoderState":
        """Return the state of these columns, such as surviving hypotheses or unfinished sentences."""
        lstm = tuple((h.index_select(0, columns_R), c.index_select(0, columns_R)) for h, c in self.lstm)
        return DecoderState(lstm, None if self.query_RD is None else self.query_RD.index_select(0, columns_R))

    def take_(self, after: "DecoderState", columns_R: Tensor) -> None:
        """Become these columns of `after`, in place."""
        for own, new in zip(self.tensors(), after.tensors(), strict=True):
            torch.index_select(new, 0, columns_R, out=own)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order."""
        query = [] if self.query_RD is None else [self.query_RD]
        return [*(tensor for layer in self.lstm for tensor in layer), *query]


class DecoderOutput(NamedTuple):
    """Output for one position: `x_RD` is the input of the softmax layer, `weights_RS` the attention."""

    x_RD: Tensor
    weights_RS: Tensor
    state: DecoderState
    gates: Gates


class Encoded(NamedTuple):
    """The encoder's output for a packed batch."""

    values_ND: Tensor
    rows: Rows


class LossOutput(NamedTuple):
    """Losses, float32 sums over the batch's target tokens, and the gates of the pass."""

    loss: Tensor  # with label smoothing; carries the gradient
    nll: Tensor  # negative log-likelihood, in nats
    gates: Gates


def normalised(x_ND: Tensor) -> Tensor:
    """Return each row less its mean, over its standard deviation: layer norm (Ba et al. 2016) without gain and bias.

    A matrix always follows, which can learn the gain, and none of our layers needs the bias. So a norm has no
    parameters. Computed in float32 and returned in the type of `x_ND`.
    """
    # Autocast would return float32.
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.layer_norm(x_ND, x_ND.shape[-1:])


class _MoELayers(nn.Module):
    """The MoE layers of one side, with their norm, dropout and residual."""

    def __init__(self, side: str, places: list[int], config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        places = places if config.moe.num_experts else []
        self.side, self.normed = side, config.norm != "none"
        counts = {place: config.moe.experts_at(str(LayerName(side, place))) for place in places}
        self.moe = nn.ModuleDict(
            {str(place): MoE(config.hidden_size, count, config.moe, share) for place, count in counts.items()}
        )
        self.dropout = nn.Dropout(config.dropout)

    def after(self, layer: int, x_ND: Tensor, real_N: Tensor | None, through: Pass) -> Tensor:
        """Return x after the MoE layer that follows LSTM `layer`, or x itself if none does."""
        if str(layer) not in self.moe:
            return x_ND
        moe = self.moe[str(layer)]
        assert isinstance(moe, MoE)
        read_ND = normalised(x_ND) if self.normed else x_ND
        return x_ND + self.dropout(through.through(str(LayerName(self.side, layer)), moe, read_ND, real_N))


class Encoder(nn.Module):
    """Stacked LSTMs over the source; the lower ones can be bidirectional."""

    def __init__(self, config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        width, cells = config.hidden_size, config.cell_size
        self.residual_from, self.normed = config.residual_from, config.norm == "layers"
        bottom = LSTM if config.bottom_layer == "forward" else BidirectionalLSTM
        self.bottom: LSTM | BidirectionalLSTM = bottom(width, *config.bottom_direction())
        second = 2 * width if config.bottom_layer == "bidirectional_full" else width
        self.upper = nn.ModuleList(
            BidirectionalLSTM(width, *config.bottom_direction())
            if layer <= config.bidirectional_layers
            else LSTM(second if layer == 2 else width, cells, width)
            for layer in range(2, config.num_encoder_layers + 1)
        )
        self.moe_layers = _MoELayers("encoder", config.encoder_moe_after, config, share)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_ND: Tensor, rows: Rows, through: Pass, bottom_ND: Tensor | None = None) -> Tensor:
        """Return top_ND for the embedded source. `bottom_ND` is the output of LSTM 1; None: it is computed here."""
        for layer, lstm in enumerate([self.bottom, *self.upper], start=1):
            read_ND = normalised(x_ND) if self.normed and layer > 1 else x_ND
            y_ND = self.dropout(lstm(read_ND, rows) if layer > 1 or bottom_ND is None else bottom_ND)
            # A layer with different input and output widths (after GNMT's full bidirectional one) has no residual.
            x_ND = x_ND + y_ND if layer >= self.residual_from and x_ND.shape == y_ND.shape else y_ND
            x_ND = self.moe_layers.after(layer, x_ND, rows.real_N, through)
        return x_ND


class Decoder(nn.Module):
    """Stacked LSTMs over the target. Layer 1 gives the attention's queries (wirings: `AttentionConfig.wiring`)."""

    def __init__(self, config: ModelConfig, share: ExpertShard) -> None:
        super().__init__()
        width, cells = config.hidden_size, config.cell_size
        self.attention_config = config.attention
        self.residual_from, self.normed = config.residual_from, config.norm == "layers"
        self.bottom = LSTM(2 * width if self.attention_config.feeds_back else width, cells, width)
        above = 2 * width if self.attention_config.context_above else width
        self.upper = nn.ModuleList(LSTM(above, cells, width) for _ in range(config.num_decoder_layers - 1))
        self.attention = Attention(width, config.attention)
        if self.attention_config.projects_context:
            self.context = nn.Linear(width, width, bias=False)
        self.moe_layers = _MoELayers("decoder", config.decoder_moe_after, config, share)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_MD: Tensor, target: Rows, encoded: Encoded, through: Pass, bottom_MD: Tensor | None = None
    ) -> Tensor:
        """Return the input of the softmax layer for whole target sentences, x_MD.

        `bottom_MD` is the output of LSTM 1; None: it is computed here, as it must be if the context is fed back to it.
        """
        if self.attention_config.feeds_back:
            x_MD, context_MD = self._feedback(x_MD, target, self.attention.memory(*encoded))
        else:
            bottom_MD = self.bottom(x_MD, target) if bottom_MD is None else bottom_MD
            x_MD = self._residual(1, x_MD, bottom_MD)
            context_MD = self.attention.attend(x_MD, encoded.values_ND, target, encoded.rows)
        return self._above(x_MD, context_MD, target.real_N, lambda _, lstm, x: lstm(x, target), through)

    def start(self, columns: int) -> DecoderState:
        """Return the state before the first position, zeros, for R columns."""
        states = tuple(lstm.start(columns) for lstm in (self.bottom, *self.upper))
        query_RD = torch.zeros_like(states[0][0]) if self.attention_config.feeds_back else None
        return DecoderState(states, query_RD)

    def step(self, x_RD: Tensor, memory: Memory, state: DecoderState, through: Pass) -> DecoderOutput:
        """Decode one position of R columns; column r belongs to sentence r mod B of `memory`."""
        if state.query_RD is not None:
            context_RD, weights_RS = self._look(state.query_RD, memory)
            first = self.bottom.step(torch.cat([x_RD, context_RD.to(x_RD.dtype)], 1), state.lstm[0])
            query_RD = x_RD = self._residual(1, x_RD, first[0])
        else:
            first = self.bottom.step(x_RD, state.lstm[0])
            query_RD, x_RD = None, self._residual(1, x_RD, first[0])
            context_RD, weights_RS = self._look(x_RD, memory)
        states = [first]

        def run(layer: int, lstm: LSTM, x_RD: Tensor) -> Tensor:
            states.append(lstm.step(x_RD, state.lstm[layer - 1]))
            return states[-1][0]

        x_RD = self._above(x_RD, context_RD, None, run, through)
        return DecoderOutput(x_RD, weights_RS, DecoderState(tuple(states), query_RD), through.gates)

    def _above(
        self,
        x_ND: Tensor,
        context_ND: Tensor,
        real_N: Tensor | None,
        run: Callable[[int, LSTM, Tensor], Tensor],
        through: Pass,
    ) -> Tensor:
        """Return what the layers above the attention make of the output of layer 1; `run` runs an LSTM layer."""
        if self.attention_config.projects_context:
            x_ND = x_ND + self.dropout(self.context(context_ND))
        x_ND = self.moe_layers.after(1, x_ND, real_N, through)
        for layer, lstm in enumerate(self.upper, start=2):
            assert isinstance(lstm, LSTM)
            read_ND = normalised(x_ND) if self.normed else x_ND
            if self.attention_config.context_above:
                read_ND = torch.cat([read_ND, context_ND], dim=1)
            x_ND = self._residual(layer, x_ND, run(layer, lstm, read_ND))
            x_ND = self.moe_layers.after(layer, x_ND, real_N, through)
        return x_ND

    def _look(self, query_RD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        # Hypotheses of a sentence are more queries to the same memory, so a beam needs no copies of it.
        columns, width = query_RD.shape
        context_KBD, weights_KBS = self.attention(query_RD.reshape(-1, memory.values_SBD.shape[1], width), memory)
        return context_KBD.reshape(columns, width), weights_KBS.reshape(columns, -1)

    def _feedback(self, x_MD: Tensor, target: Rows, memory: Memory) -> tuple[Tensor, Tensor]:
        """Run layer 1 position by position; its input is the next token and the context of its previous output.

        Returns (outputs, contexts).
        """
        # The sentences of a position are the longest ones, so that the memory is needed in the order of their length.
        sentence_B = torch.empty_like(target.rank_B, dtype=torch.int64)
        sentence_B[target.rank_B.long()] = torch.arange(len(sentence_B), device=sentence_B.device)
        memory = memory.select(sentence_B)
        state: LSTMState | None = None
        query_BD = torch.zeros_like(x_MD[: target.alive[0]])
        outputs, contexts = [], []
        weights = self.bottom.weights()
        for x_BD in x_MD.split(target.alive):
            count = len(x_BD)
            context_BD = self._look(query_BD[:count], memory.first(count))[0]
            state = None if state is None else (state[0][:count], state[1][:count])
            state = self.bottom.step(torch.cat([x_BD, context_BD.to(x_BD.dtype)], 1), state, weights)
            query_BD = self._residual(1, x_BD, state[0])
            outputs.append(query_BD)
            contexts.append(context_BD)
        return torch.cat(outputs), torch.cat(contexts)

    def _residual(self, layer: int, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        y_ND = self.dropout(y_ND)
        return x_ND + y_ND if layer >= self.residual_from else y_ND


class Seq2Seq(nn.Module):
    """The whole network for a shared vocabulary of V subwords, with all experts or a share of them.

    With a share, the other experts need another dispatcher: see `nmt.parallel.expert_parallel.make_model`.

    Arguments of several methods: `experts_per_token` is the number of active experts per token in a pass outside
    training, 0 for as many as in training. `change_gate` can change the decisions of a gate, see `ChangeGate`. In
    training, `r_drop` above 0 is the alpha of `r_drop_cross_entropy`: the batch is read twice.
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
        self.packed_output: PackedWeight | None = None
        """The softmax layer again, laid out for the products of a CPU (`with_packed_weights`)."""
        init_parameters(self, self.output)

    def encode(
        self, source_N: Tensor, rows: Rows, experts_per_token: int = 0, change_gate: ChangeGate | None = None
    ) -> tuple[Encoded, Gates]:
        """Return the encoded source of a packed batch, and the gates."""
        through = Pass(experts_per_token, change_gate)
        return Encoded(self.encoder(self._embed(self.source_embedding, source_N), rows, through), rows), through.gates

    def memory(self, encoded: Encoded) -> Memory:
        """Return what the decoder reads in a search."""
        return self.decoder.attention.memory(*encoded)

    def decode(
        self,
        target_N: Tensor,
        rows: Rows,
        encoded: Encoded,
        experts_per_token: int = 0,
        change_gate: ChangeGate | None = None,
    ) -> tuple[Tensor, Gates]:
        """Return the softmax layer's input x_ND for whole target sentences that begin with BOS, and the gates."""
        through = Pass(experts_per_token, change_gate)
        return self.decoder(self._embed(self.target_embedding, target_N), rows, encoded, through), through.gates

    def start(self, columns: int) -> DecoderState:
        """Return the decoder's state before the first position of this many columns, in tensors of its own."""
        return self.decoder.start(columns)

    def step(self, target_R: Tensor, memory: Memory, state: DecoderState, experts_per_token: int = 0) -> DecoderOutput:
        """Decode one position of R columns from `state`; column r belongs to sentence r mod B of `memory`."""
        return self.decoder.step(self._embed(self.target_embedding, target_R), memory, state, Pass(experts_per_token))

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
        """Return `output_logits` of this model's softmax layer, or the same of its packed weights."""
        if self.packed_output:
            return self.packed_output.exact_product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return output_logits(x, self.output.weight, self.output.bias)

    def forward(
        self,
        batch: Batch,
        label_smoothing: float = 0.0,
        experts_per_token: int = 0,
        r_drop: float = 0.0,
        teacher_weight: float = 0.0,
    ) -> LossOutput:
        """Return the summed loss of predicting every target token from the source and the target tokens before it.

        If the batch has a teacher's probabilities, and `teacher_weight` is above 0, it is that of
        `taught_cross_entropy`. There is none with R-Drop.
        """
        softmax, real_N = (self.output.weight, self.output.bias, batch.target_out_N), batch.target.real_N
        through = Pass(experts_per_token)
        x_ND = self._read(batch, through)
        if batch.teacher_ids_NK is not None and batch.teacher_NK is not None and teacher_weight:
            assert not r_drop
            lesson = Lesson(batch.teacher_ids_NK, batch.teacher_NK, teacher_weight)
            return LossOutput(*taught_cross_entropy(x_ND, *softmax, label_smoothing, lesson, real_N), through.gates)
        if not (r_drop and self.training):
            return LossOutput(*linear_cross_entropy(x_ND, *softmax, label_smoothing, real_N), through.gates)
        second = Pass(experts_per_token)
        losses = r_drop_cross_entropy(x_ND, self._read(batch, second), *softmax, label_smoothing, r_drop, real_N)
        return LossOutput(*losses, of_both_passes(through.gates, second.gates))

    def gates(self, batch: Batch, experts_per_token: int = 0, r_drop: float = 0.0) -> Gates:
        """Return the gates that `forward` would return, without computing anything after the last gate."""
        layers = self.config.moe_layer_names()
        if not layers:
            return {}
        first = Pass(experts_per_token)
        twice = r_drop and self.training
        if twice:
            # Read to its end, so that the second pass draws the same random numbers as in `forward`.
            self._read(batch, first)
        through = Pass(experts_per_token, last=layers[-1])
        with suppress(LastGate):
            self._read(batch, through)
        return of_both_passes(first.gates, through.gates) if twice else through.gates

    def check_experts_per_token(self, count: int) -> None:
        """Raise ValueError if a layer cannot activate `count` experts per token; 0 (as in training) is always valid."""
        for moe in self.moe_layers().values():
            moe.gate.check_experts_per_token(count)

    def _read(self, batch: Batch, through: Pass) -> Tensor:
        """Return the softmax layer's input for a batch, x_ND."""
        source, target = batch.source, batch.target
        x_ND = self._embed(self.source_embedding, batch.source_N)
        x_MD = self._embed(self.target_embedding, batch.target_in_N)
        if self.config.attention.feeds_back or through.last.startswith("encoder"):
            return self.decoder(x_MD, target, Encoded(self.encoder(x_ND, source, through), source), through)
        # The bottom layers of both sides do not need each other.
        bottom_ND, bottom_MD = side_by_side(
            lambda: self.encoder.bottom(x_ND, source), lambda: self.decoder.bottom(x_MD, target)
        )
        encoded = Encoded(self.encoder(x_ND, source, through, bottom_ND), source)
        return self.decoder(x_MD, target, encoded, through, bottom_MD)

    def _embed(self, embedding: nn.Embedding, ids_N: Tensor) -> Tensor:
        # LSTMs get inputs of unit scale, while the matrix keeps the scale that the softmax needs.
        x_ND = F.embedding(ids_N, embedding.weight) * self.config.hidden_size**0.5
        if self.config.word_dropout and self.training:
            x_ND = drop_tokens(x_ND, self.config.word_dropout)
        autocast = torch.is_autocast_enabled(x_ND.device.type)
        return self.dropout(x_ND.to(torch.get_autocast_dtype(x_ND.device.type) if autocast else self.dtype))
