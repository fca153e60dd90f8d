"""Why a sentence went where it did: the experts of every position, and what each gave to the translation.

The contribution of an expert at a position of a layer, in nats, is

    log P(Y|X) - log P(Y|X, its term taken away)

with Y the translation that the search found, its end included, and no length normalisation. Taken away means: at that
one position the term g_i E_i(x) is left out of the layer's sum y = sum_i g_i E_i(x) (S17 eq. 1; inside the sigmoid of
`output: sigmoid`), while the layer's other gates stay as they were, not scaled up to sum to 1. All that follows is
computed anew: higher layers and what their gates choose, later positions, and for an encoder layer the memory and the
whole decoder. Positive means that Y would be less probable without it. Contributions of several experts do not add up.

They are computed, not estimated: the pair is scored once for each thing taken away, in columns of a batch whose column
0 is left whole. They are as fine as the precision that the model runs in: on a model of the demo's size bf16 moved them
by a few hundredths of a nat and at most by a tenth, fp32 by 1e-5.

Letters: S source positions, T target positions, C columns (one whole, the others each without one thing), N = T C rows
of a layer in time-major order, K slots of a token, D width.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import EOS, make_batch
from nmt.config import LayerName
from nmt.decoding.scoring import Scores, score_target
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.model.attention import Memory
from nmt.model.gating import GateOutput
from nmt.model.seq2seq import Gates, Seq2Seq
from nmt.model.walk import ChangeGate

_EVERYWHERE, _NOTHING = -1, -1
# Numbers that the columns of one pass may hold in the larger layers.
_ELEMENTS = 2**28
_MAX_COLUMNS = 128


class Removal(NamedTuple):
    """One thing to take away: an expert of a layer at a position, or at all positions (None)."""

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
    """Nats; see the top of this file."""


@dataclass(frozen=True)
class ExpertTotal:
    """An expert over the whole sentence."""

    expert: int
    group: int | None
    positions: int
    """How many chose it."""
    contribution: float
    """Nats, when it is taken away at all of them at once."""


@dataclass(frozen=True)
class LayerExplanation:
    """One MoE layer; `positions` are the source's or the target's, each with its experts by falling gate."""

    layer: str
    num_experts: int
    positions: list[list[Slot]]
    experts: list[ExpertTotal]


@dataclass(frozen=True)
class Explanation:
    """What the experts gave to the translation of one sentence."""

    sentence: str
    translation: str
    source_pieces: list[str]
    """End of sentence included. The encoder's position s reads piece s."""
    target_pieces: list[str]
    """End of sentence included. The decoder's position t predicts piece t, and reads the one before it."""
    log_probability: float
    """Of the translation, in nats."""
    piece_log_probabilities: list[float]
    precision: str
    """fp32 or bf16, what all was computed in."""
    layers: list[LayerExplanation]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def pieces_of(self, layer: LayerExplanation) -> list[str]:
        """The pieces that the positions of a layer stand for."""
        return self.source_pieces if LayerName.of(layer.layer).side == "encoder" else self.target_pieces

    def __str__(self) -> str:
        """Tables for a terminal."""
        lines = [
            f"source       {self.sentence}",
            f"translation  {self.translation}",
            f"log-probability {self.log_probability:z.3f} of {len(self.target_pieces)} pieces, in {self.precision}",
            "Each expert with its gate, and by how many nats the translation would be less probable without it.",
        ]
        for layer in self.layers:
            pieces = self.pieces_of(layer)
            width = max(len(piece) for piece in pieces)
            lines += ["", f"{layer.layer}: {layer.num_experts} experts"]
            for place, (piece, slots) in enumerate(zip(pieces, layer.positions, strict=True)):
                shown = "   ".join(
                    f"{expert_name(each):>4} {each.gate:.2f} {each.contribution:+z.3f}" for each in slots
                )
                lines.append(f"  {place:>3}  {piece:<{width}}  {shown or 'none'}")
            totals = ", ".join(f"{expert_name(each)} {each.contribution:+z.3f}" for each in layer.experts)
            lines.append(f"  taken away at all positions: {totals or 'none was chosen'}")
        return "\n".join(lines)


def expert_name(expert: Slot | ExpertTotal) -> str:
    """The number of an expert, after that of its group if it has one."""
    return f"{expert.expert}" if expert.group is None else f"{expert.group}/{expert.expert}"


def without(removals: Sequence[Removal | None], device: torch.device) -> ChangeGate:
    """Gates of a pass whose column c does without removals[c], of batches of `len(removals)` equally long columns."""
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
    """log P(Y|X) of one pair of pieces, whole or with things taken away. The model must be in evaluation mode."""

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
            self.memory, gates = self._encode(1)
            scores = self._score(1, self.memory)
            self.gates: Gates = gates | scores.gates
            self.log_probability_T = scores.log_prob_TR[:, 0]

    def contributions(self, removals: Sequence[Removal]) -> list[float]:
        """What log P(Y|X) loses by each of them alone, in as many passes as memory wants."""
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
        """log P(Y|X) with each of them taken away in a column of its own; all are of one side's layers."""
        columns = len(removals)
        change_gate = without(removals, self.device)
        memory = self._encode(columns, change_gate)[0] if side == "encoder" else self.memory
        # The decoder's columns are so many hypotheses of one sentence where the memory is the same for all.
        log_prob_TC = self._score(columns, memory, change_gate).log_prob_TR
        scores: list[float] = log_prob_TC.double().sum(0).tolist()
        return scores

    def _encode(self, columns: int, change_gate: ChangeGate | None = None) -> tuple[Memory, Gates]:
        source_SC, length_C = self.batch.source_SB.repeat(1, columns), self.batch.source_length_B.repeat(columns)
        return self.model.encode(source_SC, length_C, None, self.experts_per_token, change_gate)

    def _score(self, columns: int, memory: Memory, change_gate: ChangeGate | None = None) -> Scores:
        target_in_TC, target_out_TC = (
            side_TB.repeat(1, columns) for side_TB in (self.batch.target_in_TB, self.batch.target_out_TB)
        )
        return score_target(self.model, memory, target_in_TC, target_out_TC, None, self.experts_per_token, change_gate)

    def _columns_at_once(self) -> int:
        """Columns of one pass, the whole one included."""
        config = self.model.config
        num_source, num_target = len(self.batch.source_SB), len(self.batch.target_in_TB)
        # Rows of experts for each position, on average: slots that stay empty have none.
        rows = max((float(gate.sums.count_E.sum()) / len(gate.expert_TK) for gate in self.gates.values()), default=0.0)
        per_position = 8 * config.cell_size + math.ceil(rows * max(config.hidden_size, *config.moe.hidden_sizes))
        pairs = num_source * num_target * (1 if config.attention.function == "product" else config.attention.size)
        return min(_MAX_COLUMNS, max(2, _ELEMENTS // ((num_source + num_target) * per_position + pairs)))


def explain_pair(scorer: Scorer) -> list[LayerExplanation]:
    """Every MoE layer of a scored pair: the contribution of each slot, and of each expert as a whole."""
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
    """The slots of each position by falling gate; those that stay empty are left out."""
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
    """Translate a sentence and explain the translation. `options`: None for those of the translator.

    DataError for a sentence without pieces, or with more than are translated at once.
    """
    options = options or translator.options
    subwords, limit = translator.subwords, options.max_source_pieces
    source = subwords.encode(sentence)
    if not len(source):
        raise DataError("the sentence is blank: there is nothing to explain")
    if len(source) > limit:
        raise DataError(
            f"the sentence has {len(source)} pieces, more than the decoding.max_source_pieces={limit} that are "
            "translated at once"
        )
    target = translator.search([source], options)[0][0].tokens
    scorer = Scorer(
        translator.model,
        source,
        np.array(target, dtype=np.int64),
        options.experts_per_token,
    )
    return Explanation(
        sentence=sentence,
        translation=subwords.decode(target),
        source_pieces=subwords.pieces([*source, EOS]),
        target_pieces=subwords.pieces([*target, EOS]),
        log_probability=float(scorer.log_probability_T.double().sum()),
        piece_log_probabilities=scorer.log_probability_T.tolist(),
        precision=scorer.precision,
        layers=explain_pair(scorer),
    )
