"""Report on the experts of a trained model: how they share the load, and which tokens choose each.

All figures are counts over one pass, without gate noise. nmt/pages/experts.py draws them. The number of (expert,
subword) combinations that occur bounds the memory that is kept between batches.

Letters: T tokens of a batch, K slots of a token, R slots that are not empty, N tokens of one side of the text,
P sentence pairs, E experts, M names of a labelling, X combinations of them, S shuffles, C (expert, subword)
combinations, each the number e * V + v. With E earlier
experts, C copies of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from nmt.config import Direction, LayerName
from nmt.data.held_out import encode_pairs, eval_batches
from nmt.data.subwords import Subwords
from nmt.experts.contexts import Context, SideTokens
from nmt.experts.information import (
    Purity,
    entropy_bits,
    expected_pairs,
    information,
    least_rate,
    make_purity,
    rank_in_runs,
)
from nmt.model.gate_statistics import entropy, num_idle, relative_load, shares
from nmt.model.gating import GateOutput, cv_squared
from nmt.model.seq2seq import Seq2Seq

# An expert "prefers" a domain or language with at least this lift.
_LEAST_LIFT = 1.15
_MAX_PREFERRED = 3
MATRIX_EXPERTS = 64
"""Reports have no matrix of pairs for layers with more experts than this."""
DOMAIN_SHUFFLES, TOKEN_SHUFFLES = 20, 5
MIN_COUNT = 5
"""Tokens that an expert saw fewer times than this are not listed for it."""
_MAX_TOKENS, _MAX_CONTEXTS, _MAX_PAIRS = 8, 4, 20
# More than are shown, as contexts with the same neighbouring words are shown once.
_KEPT_CONTEXTS = 4 * _MAX_CONTEXTS
_MAX_WAITING, _MAX_EXAMPLES = 500_000, 4_000_000
_SIDES = ("encoder", "decoder")
_NO_SYMBOLS: Mapping[int, str] = {}


@dataclass(frozen=True)
class TokenRole:
    """A token that chooses an expert more often than tokens do on average."""

    piece: str
    """Subword as SentencePiece writes it, with "▁" for a blank."""
    count: int
    """Number of occurrences that chose the expert."""
    rate: float
    """Share of its occurrences that chose the expert."""
    lift: float
    """`rate` divided by the expert's rate over all tokens."""
    least_lift: float
    """`lift` with the lower end of a 99% interval of `rate`."""
    contexts: list[Context]
    """Occurrences that chose the expert, the largest gate first."""


@dataclass(frozen=True)
class ExpertRow:
    """One expert of one layer."""

    expert: int
    share: float
    """Share of all (token, choice) pairs of its layer."""
    mean_gate: float
    """Mean gate value when chosen."""
    domains: dict[str, float]
    """Lift of each domain: its share of the expert's tokens, divided by its share of all tokens."""
    importance: float = 0.0
    """Share of the sum of all gate values of its layer."""
    position: float = 0.0
    """Mean position in the sentence: 0 is the first token, 1 the last."""
    specialisation: float = 0.0
    """Kullback-Leibler divergence of its tokens from all tokens, in bits, minus that of shuffled tokens."""
    tokens: list[TokenRole] = field(default_factory=list)
    """Tokens that choose the expert most clearly, the largest `least_lift` first."""
    languages: dict[str, float] = field(default_factory=dict)
    """Lift of each source language ("from en") and target language ("to fr"), like that of a domain; empty for text in
    one direction."""
    new: bool = False
    """Whether it is a copy that `nmt experts --grow` made, not one of the experts that were there before."""


@dataclass(frozen=True)
class ExpertPair:
    """Two experts that are chosen together more often than expected from their loads."""

    first: int
    second: int
    count: int
    lift: float


@dataclass(frozen=True)
class NewShare:
    """Share of choices that went to new experts (`model.moe.copies`) instead of earlier ones."""

    share: float
    by_domain: dict[str, float]
    """The same among the tokens of each domain that has any."""


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer over a corpus, without gate noise."""

    layer: str
    k: float
    """Mean number of experts per token; a whole number, except under the strictly balanced gate."""
    num_tokens: int
    cv_importance: float
    cv_load: float
    max_over_mean_load: float
    idle_experts: int
    experts: list[ExpertRow]
    gate_entropy: float = 0.0
    """Mean entropy of the gates of a token, in nats."""
    token_purity: Purity | None = None
    domain_purity: Purity | None = None
    """None if the domains of sentences are unknown or all the same."""
    pair_lift: list[list[float]] = field(default_factory=list)
    """Count of each pair of experts divided by its expected count; empty for more than MATRIX_EXPERTS experts."""
    pairs: list[ExpertPair] = field(default_factory=list)
    """Pairs of largest lift, ranked by the lower end of its interval."""
    language_purity: dict[str, Purity] = field(default_factory=dict)
    """By "source language" and "target language", each if the text has several."""
    new: NewShare | None = None
    """Of all choices; None if no experts were copied (`nmt experts --grow`)."""
    new_of_expert: list[NewShare] = field(default_factory=list)
    """Of the choices of each earlier expert and its copies, in order; empty if no experts were copied."""

    def __str__(self) -> str:
        lines = [
            f"{self.layer}: {len(self.experts)} experts, {self.k:.3g} per token, {self.num_tokens:,} tokens; "
            f"CV(importance) {self.cv_importance:.2f}, CV(load) {self.cv_load:.2f}, "
            f"max/mean load {self.max_over_mean_load:.2f}, idle {self.idle_experts}",
            f"  {'expert':>6}  {'share':>6}  {'gate':>5}  prefers (times its chance)",
        ]
        for row in self.experts:
            shown = [f"{name} x{lift:.1f}" for name, lift in preferred(row)]
            number = f"{row.expert}+" if row.new else str(row.expert)
            lines.append(f"  {number:>6}  {row.share:>6.1%}  {row.mean_gate:>5.2f}  {', '.join(shown) or '-'}")
        if self.new is not None:
            ranked = sorted(self.new.by_domain.items(), key=lambda item: -item[1])
            domains = ", ".join(f"{name} {share:.1%}" for name, share in ranked)
            told = f"  new experts (+) have {self.new.share:.1%} of all choices"
            lines.append(f"{told}; by domain: {domains}" if domains else told)
        return "\n".join(lines)


def preferred(row: ExpertRow) -> list[tuple[str, float]]:
    """Return the domains and languages that an expert sees clearly more often than by chance, by falling lift."""
    ranked = sorted([*row.domains.items(), *row.languages.items()], key=lambda item: -item[1])
    return [(name, lift) for name, lift in ranked if lift >= _LEAST_LIFT][:_MAX_PREFERRED]


class _Labelling(NamedTuple):
    """One kind of label of the sentence pairs, such as their domains."""

    kind: str
    names: list[str]
    name_X: np.ndarray
    """Number of the name in each combination of labels of all kinds."""

    def counts(self, count_X: np.ndarray) -> np.ndarray:
        """Return counts (..., M) by name, from those (..., X) by combination."""
        return count_X @ np.eye(len(self.names))[self.name_X]


def _labels(domains: Sequence[str], directions: Sequence[Direction], pairs: int) -> tuple[np.ndarray, list[_Labelling]]:
    """Return (the combination of labels of each pair, the labellings), without languages that are all the same."""
    columns: dict[str, list[str]] = {"domain": list(domains)} if domains else {}
    languages = {
        "source language": [f"from {direction.source}" for direction in directions],
        "target language": [f"to {direction.target}" for direction in directions],
    }
    columns |= {kind: labels for kind, labels in languages.items() if len(set(labels)) > 1}
    of_pair = [tuple(labels) for labels in zip(*columns.values(), strict=True)] or [()] * pairs
    combinations = sorted(set(of_pair))
    number = {combination: place for place, combination in enumerate(combinations)}
    labellings = []
    for place, (kind, labels) in enumerate(columns.items()):
        names = sorted(set(labels))
        name_X = np.array([names.index(combination[place]) for combination in combinations])
        labellings.append(_Labelling(kind, names, name_X))
    return np.array([number[combination] for combination in of_pair]), labellings


# ------------------------------------------------------------------------------------------------- counting


class _Layer:
    """Counts of one layer. The first labels, their tables and cells are the true ones, the others are shuffled."""

    def __init__(self, side: SideTokens, num_experts: int, label_LP: np.ndarray, num_pieces: int) -> None:
        self.side, self.label_LP, self.num_pieces = side, label_LP, num_pieces
        self.num_tokens, self.entropy = 0, 0.0
        self.importance_E = np.zeros(num_experts)
        self.count_LEX = np.zeros((len(label_LP), num_experts, int(label_LP[0].max(initial=0)) + 1))
        self.together_EE = np.zeros((num_experts, num_experts))
        self.position_E = np.zeros(num_experts)
        self.cells: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0)) for _ in side.pieces]
        self.examples = (np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))  # cell, gate, place
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (expert_R, gate_R, place_R)

    def add(self, gate: GateOutput, sentence_T: np.ndarray, position_T: np.ndarray) -> None:
        """Add the tokens of a batch: the sentence and position of each, and their gates."""
        num_experts, length_T = len(self.position_E), self.side.length_P[sentence_T]
        chosen_TE = gate.gates_TK.new_zeros(len(sentence_T), num_experts + 1).scatter_(1, gate.expert_TK, 1.0)[:, :-1]
        self.together_EE += (chosen_TE.T @ chosen_TE).cpu().numpy()
        expert_TK, gates_TK = gate.expert_TK.cpu(), gate.gates_TK.double().cpu()
        self.num_tokens += len(sentence_T)
        self.entropy += float(entropy(gates_TK))
        token_R, slot_R = np.nonzero(expert_TK.numpy() < num_experts)
        expert_R, gate_R = expert_TK.numpy()[token_R, slot_R], gates_TK.numpy()[token_R, slot_R]
        np.add.at(self.importance_E, expert_R, gate_R)
        for count_EX, label_P in zip(self.count_LEX, self.label_LP, strict=True):
            np.add.at(count_EX, (expert_R, label_P[sentence_T[token_R]]), 1)
        np.add.at(self.position_E, expert_R, (position_T / np.maximum(length_T - 1, 1))[token_R])
        if sum(len(each[0]) for each in self.waiting) > _MAX_WAITING:
            self._settle()
        self.waiting.append((expert_R, gate_R, (self.side.end_P[sentence_T] - length_T + position_T)[token_R]))

    def _settle(self) -> None:
        """Move the choices in `waiting` into the counts of subwords and into the examples."""
        expert_R, gate_R, place_R = (np.concatenate(column) for column in zip(*self.waiting, strict=True))
        self.waiting = []
        for shuffle, piece_N in enumerate(self.side.pieces):
            cells = np.concatenate([self.cells[shuffle][0], expert_R * self.num_pieces + piece_N[place_R]])
            counts = np.concatenate([self.cells[shuffle][1], np.ones(len(expert_R))])
            cell_C, where = np.unique(cells, return_inverse=True)
            self.cells[shuffle] = cell_C, np.bincount(where, counts)
        new = expert_R * self.num_pieces + self.side.pieces[0][place_R], gate_R, place_R
        cell, gate, place = (np.concatenate(column) for column in zip(self.examples, new, strict=True))
        order = np.lexsort((place, -gate, cell))
        order = order[rank_in_runs(cell[order]) < _KEPT_CONTEXTS]
        order = order[np.sort(np.argsort(-gate[order], kind="stable")[:_MAX_EXAMPLES])]
        self.examples = cell[order], gate[order], place[order]

    def report(self, layer: str, labellings: list[_Labelling], copies: int, subwords: Subwords) -> LayerReport:
        """Return the report, with these kinds of labels; `copies` is the setting."""
        self._settle()
        count_E, importance_E = torch.from_numpy(self.count_LEX[0].sum(1)), torch.from_numpy(self.importance_E)
        total = max(float(count_E.sum()), 1.0)
        pieces = [(*np.divmod(cell_C, self.num_pieces), count_C) for cell_C, count_C in self.cells]
        piece_bits_LE = np.stack([information(*each, len(count_E)) for each in pieces])
        piece_entropy = entropy_bits(np.bincount(pieces[0][1], pieces[0][2]))
        pair_lift, pairs = self._pairs()
        purities = {each.kind: self._label_purity(each) for each in labellings if each.names[1:]}
        domains = next((each for each in labellings if each.kind == "domain"), None)
        names = domains.names if domains else []
        count_EM = domains.counts(self.count_LEX[0]) if domains else self.count_LEX[0].sum(1, keepdims=True)
        count_ECM = count_EM.reshape(-1, copies, count_EM.shape[1])
        return LayerReport(
            layer=layer,
            k=float(count_E.sum()) / self.num_tokens,
            num_tokens=self.num_tokens,
            cv_importance=float(cv_squared(importance_E).sqrt()),
            cv_load=float(cv_squared(count_E).sqrt()),
            max_over_mean_load=float(relative_load(count_E).max()),
            idle_experts=num_idle(count_E),
            experts=self._rows(labellings, copies, subwords, piece_bits_LE[0] - piece_bits_LE[1:].mean(0)),
            gate_entropy=self.entropy / self.num_tokens,
            token_purity=make_purity(piece_bits_LE.sum(1) / total, piece_entropy),
            domain_purity=purities.pop("domain", None),
            pair_lift=pair_lift,
            pairs=pairs,
            language_purity=purities,
            new=_new_share(count_ECM.sum(0), names) if copies > 1 else None,
            new_of_expert=[_new_share(count_CM, names) for count_CM in count_ECM] if copies > 1 else [],
        )

    def _rows(
        self, labellings: list[_Labelling], copies: int, subwords: Subwords, special_E: np.ndarray
    ) -> list[ExpertRow]:
        """Return the row of each expert; `special_E` is its specialisation in bits, summed over its tokens."""
        importance_E, count_E = torch.from_numpy(self.importance_E), torch.from_numpy(self.count_LEX[0].sum(1))
        least_E = count_E.clamp_min(1)
        lifts: dict[str, list[dict[str, float]]] = {each.kind: self._lifts(each, least_E) for each in labellings}
        without: list[dict[str, float]] = [{}] * len(count_E)
        domains = lifts.pop("domain", without)
        languages = [
            {name: lift for some in each for name, lift in some.items()} for each in zip(*lifts.values(), strict=True)
        ]
        figures_EF = torch.stack(
            [
                shares(count_E),
                importance_E / least_E,
                shares(importance_E),
                torch.from_numpy(self.position_E) / least_E,
                torch.from_numpy(special_E) / least_E,
            ],
            dim=1,
        )
        tokens = self._tokens(subwords)
        return [
            ExpertRow(
                expert=expert,
                share=share,
                mean_gate=mean_gate,
                domains=domains[expert],
                importance=importance,
                position=position,
                specialisation=specialisation,
                tokens=tokens[expert],
                languages=languages[expert] if languages else {},
                new=expert % copies > 0,
            )
            for expert, (share, mean_gate, importance, position, specialisation) in enumerate(figures_EF.tolist())
        ]

    def _lifts(self, labelling: _Labelling, least_E: torch.Tensor) -> list[dict[str, float]]:
        """Return the lift of each name for each expert, given the number of its tokens or 1."""
        count_EM = torch.from_numpy(labelling.counts(self.count_LEX[0]))
        count_M = count_EM.sum(0)
        lift_EM = (count_EM / least_E[:, None]) / shares(count_M)
        return [
            {name: lift for name, lift, count in zip(labelling.names, lift_M, count_M.tolist(), strict=True) if count}
            for lift_M in lift_EM.tolist()
        ]

    def _label_purity(self, labelling: _Labelling) -> Purity:
        count_LEM = labelling.counts(self.count_LEX)
        num_experts, num_names = count_LEM[0].shape
        expert_C, label_C = np.indices((num_experts, num_names)).reshape(2, -1)
        bits_LE = np.stack([information(expert_C, label_C, each.ravel(), num_experts) for each in count_LEM])
        total = max(count_LEM[0].sum(), 1.0)
        return make_purity(bits_LE.sum(1) / total, entropy_bits(count_LEM[0].sum(0)))

    def _tokens(self, subwords: Subwords) -> list[list[TokenRole]]:
        """Return, for each expert, the tokens that choose it more often than tokens do on average."""
        cell_C, count_C = self.cells[0]
        expert_C, piece_C = np.divmod(cell_C, self.num_pieces)
        trials_C = np.bincount(self.side.pieces[0], minlength=self.num_pieces)[piece_C]
        rate_C = self.together_EE.diagonal()[expert_C] / self.num_tokens
        least_C = least_rate(count_C, trials_C) / rate_C
        kept = np.flatnonzero((count_C >= MIN_COUNT) & (least_C > 1))
        kept = kept[np.lexsort((-least_C[kept], expert_C[kept]))]
        roles: list[list[TokenRole]] = [[] for _ in self.position_E]
        for c in kept[rank_in_runs(expert_C[kept]) < _MAX_TOKENS]:
            found = slice(*np.searchsorted(self.examples[0], [cell_C[c], cell_C[c] + 1]))
            different: dict[str, Context] = {}
            for gate, place in zip(self.examples[1][found].tolist(), self.examples[2][found].tolist(), strict=True):
                context = self.side.context(gate, place, subwords)
                different.setdefault(str((context.before.split(" ")[-3:], context.after.split(" ")[:3])), context)
            contexts = list(different.values())[:_MAX_CONTEXTS]
            rate = float(count_C[c] / trials_C[c])
            figures = int(count_C[c]), rate, rate / float(rate_C[c]), float(least_C[c])
            roles[expert_C[c]].append(TokenRole(self.side.piece(piece_C[c], subwords), *figures, contexts))
        return roles

    def _pairs(self) -> tuple[list[list[float]], list[ExpertPair]]:
        """Return the matrix of lifts and the pairs of largest lift."""
        expected_EE = expected_pairs(self.together_EE)
        if not expected_EE.any():
            return [], []
        lift_EE = np.divide(self.together_EE, expected_EE, out=np.ones_like(expected_EE), where=expected_EE > 0)
        first, second = np.nonzero(np.triu(expected_EE > 0, 1))
        count = self.together_EE[first, second]
        least = least_rate(count, np.full(len(count), self.num_tokens)) / expected_EE[first, second]
        best = np.argsort(-least, kind="stable")[:_MAX_PAIRS]
        best = best[least[best] * self.num_tokens > 1]
        pairs = [
            ExpertPair(int(i), int(j), int(self.together_EE[i, j]), float(lift_EE[i, j]))
            for i, j in zip(first[best], second[best], strict=True)
        ]
        return lift_EE.tolist() if len(lift_EE) <= MATRIX_EXPERTS else [], pairs


def _new_share(count_CM: np.ndarray, domains: list[str]) -> NewShare:
    """Return the share of all copies but the first in these counts of C copies by domain."""
    of_domain = {
        name: _share(count_CM[1:, m], count_CM[:, m]) for m, name in enumerate(domains) if count_CM[:, m].any()
    }
    return NewShare(_share(count_CM[1:], count_CM), of_domain)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / max(whole.sum(), 1.0))


@torch.inference_mode()
def expert_report(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    domains: Sequence[str],
    experts_per_token: int = 0,
    directions: Sequence[Direction] = (),
    prefixes: Sequence[Sequence[int]] = (),
    symbols: Mapping[int, str] = _NO_SYMBOLS,
    copies: int = 1,
) -> list[LayerReport]:
    """Return a report for each MoE layer from one pass over sentence pairs; empty if there are no MoE layers.

    `domains` and `directions` have the domain and the direction of each pair, or are empty. `prefixes` are as for
    `encode_pairs`, `symbols` as for `SideTokens`, and `copies` is the setting `model.moe.copies`. The model must be in
    evaluation mode. Counts all tokens except padding, including the end of each sentence and the symbols before it.
    """
    generator = np.random.default_rng(0)
    label_P, labellings = _labels(domains, directions, len(sources))
    label_LP = np.stack([label_P, *(generator.permutation(label_P) for _ in range(DOMAIN_SHUFFLES))])
    encoded = encode_pairs(subwords, sources, targets, prefixes=prefixes)[:2]
    sides = {
        name: SideTokens(text, name == "decoder", TOKEN_SHUFFLES, generator, symbols)
        for name, text in zip(_SIDES, encoded, strict=True)
    }
    layers: dict[str, _Layer] = {}
    for batch in eval_batches(*encoded, 4096):
        gates = model.gates(batch.to(model.device), experts_per_token=experts_per_token)
        for layer, gate in gates.items():
            name = LayerName.of(layer).side
            if layer not in layers:
                sizes = gate.sums.count_E.numel(), label_LP, subwords.size
                layers[layer] = _Layer(sides[name], *sizes)
            rows = batch.source if name == "encoder" else batch.target
            position_T, column_T = np.divmod(rows.cell_N.numpy(), len(batch.pairs_B))
            layers[layer].add(gate, batch.pairs_B.numpy()[column_T], position_T)
    return [tally.report(layer, labellings, copies, subwords) for layer, tally in layers.items()]
