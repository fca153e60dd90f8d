"""Explain a translation: the experts at each position, and what each contributes to the translation.

The contribution of an expert at a position of a layer, in nats, is

    log P(Y|X) - log P(Y|X, its term removed)

where Y is the translation that the search found, including its end, without length normalisation. To remove a term is
to leave g_i E_i(x) out of the layer's sum y = sum_i g_i E_i(x) at that one position (S17 eq. 1; inside the sigmoid of
`output: sigmoid`). The layer's other gates do not change: they are not rescaled to sum to 1. Everything that depends on
the sum is computed again: higher layers and the choices of their gates, later positions and, for an encoder layer, the
memory and the whole decoder. A positive contribution means that Y would be less probable without the expert.
Contributions of several experts do not add up.

Contributions are computed, not estimated: the pair is scored once per removal. Each removal has a column of a batch,
whose column 0 is unchanged. Their accuracy is that of the precision in which the model runs. On a model of the size of
the demo, bf16 changed them by a few hundredths of a nat, at most by a tenth, and fp32 by 1e-5.

Letters: S source positions, T target positions, C columns (one unchanged, the others with one removal each), N = T C
rows of a layer in time-major order, K slots of a token, D width.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import Rows, make_batch, make_rows
from nmt.config import LayerName
from nmt.data.subwords import readable
from nmt.decoding.normalising import has_words
from nmt.decoding.scoring import Scores, score_target
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.model.gating import GateOutput
from nmt.model.one_pass import ChangeGate, Gates
from nmt.model.seq2seq import Encoded, Seq2Seq
from nmt.tokens import EOS
from nmt.wording import counted

_EVERYWHERE, _NOTHING = -1, -1
# Upper bound of the numbers that one pass may have in its larger tensors, over all columns.
_ELEMENTS = 2**28
_MAX_COLUMNS = 128


class Removal(NamedTuple):
    """An expert of a layer to remove at one position, or at all positions (None)."""

    layer: str
    expert: int
    position: int | None = None


@dataclass(frozen=True)
class Slot:
    """An expert that one position chose."""

    expert: int
    group: int | None
    """Its group, in a hierarchical layer."""
    gate: float
    contribution: float
    """In nats; defined at the top of this file."""


@dataclass(frozen=True)
class ExpertTotal:
    """An expert over the whole sentence."""

    expert: int
    group: int | None
    positions: int
    """Number of positions that chose it."""
    contribution: float
    """In nats, when it is removed at all of them at once."""


@dataclass(frozen=True)
class LayerExplanation:
    """One MoE layer. `positions` has each source or target position with its experts, the largest gate first."""

    layer: str
    num_experts: int
    positions: list[list[Slot]]
    experts: list[ExpertTotal]


@dataclass(frozen=True)
class Explanation:
    """What the experts contribute to the translation of one sentence."""

    sentence: str
    translation: str
    source_pieces: list[str]
    """Subwords, including the end of the sentence. The encoder reads them in order, after `source_symbols`."""
    target_pieces: list[str]
    """Subwords, including the end of the sentence. Decoder position t reads subword t - 1 and predicts subword t."""
    log_probability: float
    """Log-probability of the translation, in nats."""
    piece_log_probabilities: list[float]
    precision: str
    """Precision of the computation: fp32 or bf16."""
    layers: list[LayerExplanation]
    attention: list[list[float]] = field(default_factory=list)
    """A row for each target subword that the model wrote: its attention to each source subword. A row sums to 1, less
    what goes to symbols."""
    source_symbols: list[str] = field(default_factory=list)
    """What a reader sees for the symbols of the direction and tag, which the encoder reads before the subwords."""

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as dictionaries and lists, for JSON."""
        return asdict(self)

    def pieces_of(self, layer: LayerExplanation) -> list[str]:
        """Return the piece of each position of a layer: of the source in the encoder, else of the target."""
        return (
            [*self.source_symbols, *self.source_pieces]
            if LayerName.of(layer.layer).side == "encoder"
            else self.target_pieces
        )

    def __str__(self) -> str:
        """Return tables for a terminal."""
        lines = [
            f"source       {self.sentence}",
            f"translation  {self.translation}",
            f"log-probability {self.log_probability:z.3f} of {counted(len(self.target_pieces), 'subword')}, "
            f"in {self.precision}",
            "Each expert with its gate, and by how many nats the translation would be less probable without it.",
        ]
        for layer in self.layers:
            pieces = [readable(piece) for piece in self.pieces_of(layer)]
            width = max(len(piece) for piece in pieces)
            lines += ["", f"{layer.layer}: {layer.num_experts} experts"]
            for place, (piece, slots) in enumerate(zip(pieces, layer.positions, strict=True)):
                shown = "   ".join(
                    f"{expert_name(each):>4} {each.gate:.2f} {each.contribution:+z.3f}" for each in slots
                )
                lines.append(f"  {place:>3}  {piece:<{width}}  {shown or 'none'}")
            totals = ", ".join(f"{expert_name(each)} {each.contribution:+z.3f}" for each in layer.experts)
            lines.append(f"  removed at all positions: {totals or 'none was chosen'}")
        return "\n".join(lines)


def expert_name(expert: Slot | ExpertTotal) -> str:
    """Return the number of an expert, such as "3", or "1/3" in group 1."""
    return f"{expert.expert}" if expert.group is None else f"{expert.group}/{expert.expert}"


def without(removals: Sequence[Removal | None], device: torch.device) -> ChangeGate:
    """Return a change of gates that applies removals[c] to column c (None: no change).

    The batch must have `len(removals)` columns of equal length.
    """
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in {each.layer for each in removals if each is not None}:
        mine = [each if each is not None and each.layer == layer else None for each in removals]
        experts = [_NOTHING if each is None else each.expert for each in mine]
        positions = [_EVERYWHERE if each is None or each.position is None else each.position for each in mine]
        wanted[layer] = (torch.tensor(experts, device=device), torch.tensor(positions, device=device))

    def change(layer: str, gate: GateOutput) -> GateOutput:
        if layer not in wanted:
            return gate
        expert_C, position_C = wanted[layer]
        columns = len(expert_C)
        row_N = torch.arange(len(gate.expert_TK), device=device)
        column_N, place_N = row_N % columns, row_N // columns
        position_N = position_C[column_N]
        here_N = (position_N == _EVERYWHERE) | (position_N == place_N)
        gone_NK = (gate.expert_TK == expert_C[column_N, None]) & here_N[:, None]
        return gate._replace(gates_TK=gate.gates_TK.masked_fill(gone_NK, 0.0))

    return change


class Scorer:
    """Scores one sentence pair with log P(Y|X), with or without removals. The model must be in evaluation mode."""

    def __init__(
        self,
        model: Seq2Seq,
        source: np.ndarray,
        target: np.ndarray,
        experts_per_token: int = 0,
    ) -> None:
        assert not model.training
        self.experts_per_token = experts_per_token
        self.model, self.device = model, model.device
        self.layers = model.moe_layers()
        self.batch = make_batch(np.arange(1), [source], [target]).to(model.device)
        self.precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        with torch.inference_mode():
            self.encoded, gates = self._encode(1)
            scores = self._score(1, self.encoded)
            self.gates: Gates = gates | scores.gates
            self.log_probability_T = scores.log_prob_TB[:, 0]

    def contributions(self, removals: Sequence[Removal]) -> list[float]:
        """Return what log P(Y|X) loses by each removal alone. Memory bounds the removals per pass."""
        found = [0.0] * len(removals)
        size = self._columns_at_once() - 1
        for side in ("encoder", "decoder"):
            mine = [index for index, removal in enumerate(removals) if LayerName.of(removal.layer).side == side]
            for start in range(0, len(mine), size):
                chosen = mine[start : start + size]
                whole, *others = self.scores(side, [None, *(removals[index] for index in chosen)])
                for index, score in zip(chosen, others, strict=True):
                    found[index] = whole - score
        return found

    @torch.inference_mode()
    def scores(self, side: str, removals: Sequence[Removal | None]) -> list[float]:
        """Return log P(Y|X) with each removal alone (None: without one); all must be in layers of the same side."""
        columns = len(removals)
        change_gate = without(removals, self.device)
        encoded = self._encode(columns, change_gate)[0] if side == "encoder" else self.encoded
        log_prob_TC = self._score(columns, encoded, change_gate).log_prob_TB
        scores: list[float] = log_prob_TC.double().sum(0).tolist()
        return scores

    def _encode(self, columns: int, change_gate: ChangeGate | None = None) -> tuple[Encoded, Gates]:
        source_N, rows = _repeated(self.batch.source_N, columns), self._rows(self.batch.source, columns)
        return self.model.encode(source_N, rows, self.experts_per_token, change_gate)

    def _score(self, columns: int, encoded: Encoded, change_gate: ChangeGate | None = None) -> Scores:
        batch = self.batch
        if encoded.rows.num_sentences < columns:
            values_ND = _repeated(encoded.values_ND, columns)
            encoded = Encoded(values_ND, self._rows(batch.source, columns))
        ids = _repeated(batch.target_in_N, columns), _repeated(batch.target_out_N, columns)
        rows = self._rows(batch.target, columns)
        return score_target(self.model, encoded, *ids, rows, self.experts_per_token, change_gate)

    def _rows(self, rows: Rows, columns: int) -> Rows:
        """Return the rows of a batch that has the sentence `columns` times."""
        repeated, _ = make_rows(np.full(columns, rows.num_positions))
        return repeated.map(lambda tensor: tensor.to(self.device))

    def _columns_at_once(self) -> int:
        """Return the number of columns per pass, including the unchanged one."""
        config = self.model.config
        num_source, num_target = len(self.batch.source_N), len(self.batch.target_in_N)
        # Mean expert rows per position: empty slots have none.
        rows = max((float(gate.sums.count_E.sum()) / len(gate.expert_TK) for gate in self.gates.values()), default=0.0)
        per_position = 8 * config.cell_size + math.ceil(rows * max(config.hidden_size, *config.moe.hidden_sizes))
        pairs = num_source * num_target * (1 if config.attention.function == "product" else config.attention.size)
        return min(_MAX_COLUMNS, max(2, _ELEMENTS // ((num_source + num_target) * per_position + pairs)))


def _repeated(x_N: Tensor, columns: int) -> Tensor:
    """Return the rows of a batch that has the one sentence of `x_N` (positions, ...) `columns` times."""
    return x_N.repeat_interleave(columns, dim=0)


def explain_pair(scorer: Scorer) -> list[LayerExplanation]:
    """Return the MoE layers of a scored pair, with the contribution of each slot and of each expert over the pair."""
    chosen = {layer: _chosen(gate, scorer.layers[layer].num_experts) for layer, gate in scorer.gates.items()}
    removals = [
        Removal(layer, expert, position)
        for layer, positions in chosen.items()
        for position, slots in enumerate(positions)
        for expert, _ in slots
    ]
    removals += dict.fromkeys(Removal(each.layer, each.expert) for each in removals)
    contributions = dict(zip(removals, scorer.contributions(removals), strict=True))
    return [_explain_layer(scorer, layer, positions, contributions) for layer, positions in chosen.items()]


_Chosen = list[list[tuple[int, float]]]
"""(expert, gate) of each slot of each position."""


def _chosen(gate: GateOutput, num_experts: int) -> _Chosen:
    """Return the slots of each position without empty ones, the largest gate first."""
    positions = []
    for experts, values in zip(gate.expert_TK.tolist(), gate.gates_TK.tolist(), strict=True):
        slots = [(expert, value) for expert, value in zip(experts, values, strict=True) if expert < num_experts]
        positions.append(sorted(slots, key=lambda slot: -slot[1]))
    return positions


def _explain_layer(
    scorer: Scorer, layer: str, positions: _Chosen, contributions: dict[Removal, float]
) -> LayerExplanation:
    moe, num_experts = scorer.model.config.moe, scorer.layers[layer].num_experts
    size = len(moe.groups_at(layer)[0])

    def group(expert: int) -> int | None:
        return expert // size if moe.is_hierarchical else None

    rows = [
        [Slot(expert, group(expert), gate, contributions[Removal(layer, expert, place)]) for expert, gate in slots]
        for place, slots in enumerate(positions)
    ]
    counts = Counter(expert for slots in positions for expert, _ in slots)
    totals = [
        ExpertTotal(expert, group(expert), count, contributions[Removal(layer, expert)])
        for expert, count in counts.items()
    ]
    return LayerExplanation(layer, num_experts, rows, sorted(totals, key=lambda total: -total.contribution))


def explain_sentence(translator: Translator, sentence: str, options: Options | None = None) -> Explanation:
    """Translate a sentence and return the explanation of the translation. `options`: None for the translator's own.

    DataError for a sentence that `translate` returns unchanged, or one with more than max_source_pieces subwords.
    """
    options = options or translator.options
    subwords, limit = translator.subwords, options.max_source_pieces
    (sentence,) = translator.as_read([sentence], options)
    source = subwords.encode(sentence)
    if not len(source):
        raise DataError("the sentence is blank, so there is nothing to explain: give one with words")
    if not has_words(sentence, subwords.unlearned(sentence)):
        raise DataError(
            "the sentence has no letter or digit that the model knows, so it is not translated and there is nothing to "
            "explain: give one with words"
        )
    if len(source) > limit:
        raise DataError(
            f"the sentence has {counted(len(source), 'subword')}, more than decoding.max_source_pieces={limit}: "
            "give a shorter one, or raise the setting"
        )
    symbols = translator.source_symbols(options)
    best = translator.searcher.search([source], replace(options, attention=True), symbols=symbols)[0][0]
    target = best.tokens
    assert best.attention_TS is not None
    scorer = Scorer(
        translator.model,
        np.concatenate([symbols, source]).astype(np.int64),
        np.array(target, dtype=np.int64),
        options.experts_per_token,
    )
    shown = translator.shown_symbols()
    return Explanation(
        sentence=sentence,
        translation=subwords.decode(target),
        source_pieces=subwords.pieces([*source, EOS]),
        target_pieces=subwords.pieces([*target, EOS]),
        log_probability=float(scorer.log_probability_T.double().sum()),
        piece_log_probabilities=scorer.log_probability_T.tolist(),
        precision=scorer.precision,
        layers=explain_pair(scorer),
        attention=best.attention_TS.tolist(),
        source_symbols=[shown[symbol] for symbol in symbols],
    )
