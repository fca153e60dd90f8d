"""Warnings about gates while a model trains, each with a remedy. See `nmt.model.gate_statistics` for the scale.

Letters: E experts.
"""

import math
from collections import deque
from collections.abc import Mapping

import torch

from nmt.config import MoEConfig
from nmt.model.gate_statistics import GateFigures, num_idle
from nmt.model.gating import cv_squared

# A judgement needs this many steps, and this many tokens per expert on average. Chance alone then leaves no expert
# idle, and adds less than 0.02 to CV(load)^2.
LEAST_UPDATES = 10
LEAST_EXPECTED = 50
# This many judgements in a row start a warning, or end it.
PATIENCE = 3

# Bounds of CV^2 above which a gate has collapsed, see `collapse_bound`.
_COLLAPSE_LEAST, _COLLAPSE_MOST = 0.4, 3.0
# The balance losses of a layer dominate above this share of the token loss. A token loss below half a nat counts as
# half a nat: little is left to learn then, as in the phrasebook after a minute.
_DOMINANT_SHARE = 0.1
_LEAST_TOKEN_LOSS = 0.5
# What a balance weight becomes in a remedy: ten times as much or little, the default where it was 0, never above 1.
_STEP, _FIRST_WEIGHT, _LARGEST_WEIGHT = 10.0, 0.01, 1.0


def collapse_bound(num_experts: int, experts_per_token: int) -> float:
    """Return the CV^2 of loads above which a gate with k active experts of E has collapsed.

    Loads x_E keep E / (1 + CV^2) = (sum x)^2 / sum x^2 experts busy in effect: E if all are equal, k if every token
    goes to the same k. A gate has collapsed when fewer than sqrt(E k) are busy, the geometric middle of the two, or
    fewer than E / 4 where that is more: CV^2 = sqrt(E/k) - 1, at most 3. CV^2 cannot be more than E/k - 1. The bound is
    at least 0.4: a gate that uses more than 71 % of its experts, and can waste few, never counts as collapsed. CV
    bounds for k = 1 of 2: 0.64; 2 of 8: 1; 4 of 32: 1.35; 4 of 256 (S17 Table 6: 3.0) to 2048: 1.73.
    """
    return min(max(math.sqrt(num_experts / experts_per_token) - 1.0, _COLLAPSE_LEAST), _COLLAPSE_MOST)


class _Alarm:
    """Off until `patience` judgements in a row were bad, then on until PATIENCE in a row were good."""

    def __init__(self) -> None:
        self.on = False
        self.streak = 0

    def begins(self, bad: bool, patience: int = PATIENCE) -> bool:
        """Take one judgement, and return whether it switches the alarm on."""
        self.streak = self.streak + 1 if bad != self.on else 0
        if self.streak < (PATIENCE if self.on else patience):
            return False
        self.on, self.streak = bad, 0
        return bad


class _LayerState:
    """The memory of the judgements of one layer."""

    def __init__(self, num_experts: int) -> None:
        self.collapse, self.idle, self.dominance = _Alarm(), _Alarm(), _Alarm()
        self.concentration = 0.0  # CV^2 over its `collapse_bound`
        self.dominated: deque[bool] = deque(maxlen=PATIENCE)
        self.updates = 0
        self.count_E = torch.zeros(num_experts, dtype=torch.float64)
        self.importance_E = torch.zeros(num_experts, dtype=torch.float64)
        self.idle_judgements_E = torch.zeros(num_experts, dtype=torch.int64)  # in a row, up to now
        self.missed_E = torch.zeros(num_experts, dtype=torch.float64)  # tokens that a fair share of these would be

    def take(self, gate: GateFigures, updates: int) -> bool:
        """Add an interval, and return whether there is now enough to judge."""
        self.updates += updates
        self.count_E += gate.count_E
        self.importance_E += gate.importance_E
        if self.updates < LEAST_UPDATES or self.count_E.mean() < LEAST_EXPECTED:
            return False
        idle_E = self.count_E == 0
        self.idle_judgements_E = torch.where(idle_E, self.idle_judgements_E + 1, 0)
        self.missed_E = torch.where(idle_E, self.missed_E + self.count_E.mean(), 0.0)
        return True

    def clear(self) -> None:
        """Start the next judgement."""
        self.updates = 0
        self.count_E.zero_()
        self.importance_E.zero_()


class GateWatch:
    """Warns in one line when a gate fails, with a remedy; silent as long as the failure lasts.

    Collapse: a few experts get nearly all tokens, or nearly all of the gates' weight (`collapse_bound`). Idle: the same
    experts got no token in PATIENCE judgements. Dominance: a gate far from collapse has balance losses of more than a
    tenth of the token loss in most of PATIENCE judgements (these are of single updates). While a gate is collapsed the
    other two are not reported: they follow from it.

    A judgement is of loads over at least LEAST_UPDATES updates and LEAST_EXPECTED tokens per expert, whatever
    training.log_every is. There is none before training.warmup_steps: gates that start equal lean one way before the
    balance losses take effect. A warning starts after PATIENCE bad judgements in a row. It is repeated only after as
    many good ones.
    """

    def __init__(self, moe: MoEConfig, warmup_steps: int) -> None:
        self.moe = moe
        self.warmup_steps = warmup_steps
        self.states: dict[str, _LayerState] = {}

    def judge(self, step: int, updates: int, token_loss: float, gates: Mapping[str, GateFigures]) -> list[str]:
        """Return the warnings that start with the line of metrics at `step`, which covers `updates` steps."""
        if step - updates < self.warmup_steps or not math.isfinite(token_loss):
            return []
        warnings: list[str] = []
        for layer, gate in gates.items():
            state = self.states.setdefault(layer, _LayerState(gate.count_E.numel()))
            if not state.take(gate, updates):
                continue
            text = self._collapse(state, layer)
            if not state.collapse.on:
                text = self._idle(state, layer) + self._dominance(state, layer, gate, token_loss)
            state.clear()
            warnings += [f"step {step:,}: warning: {layer} {each}" for each in text]
        return warnings

    def _collapse(self, state: _LayerState, layer: str) -> list[str]:
        num_experts = state.count_E.numel()
        cv2_load, cv2_importance = float(cv_squared(state.count_E)), float(cv_squared(state.importance_E))
        # At worst all tokens have the same k experts, but all of their weight may go to the same one.
        of_load = cv2_load / collapse_bound(num_experts, min(self.moe.experts_per_token, num_experts))
        of_importance = cv2_importance / collapse_bound(num_experts, 1)
        state.concentration = max(of_load, of_importance)
        if not state.collapse.begins(state.concentration > 1.0):
            return []
        what, cv2 = ("tokens go", cv2_load) if of_load > 1.0 else ("gates' weight goes", cv2_importance)
        return [
            f"has collapsed: its {what} to {num_experts / (1.0 + cv2):.1f} of {num_experts} experts in effect "
            f"(CV {math.sqrt(cv2):.2f}, {num_idle(state.count_E)} idle); {self._remedy(layer, num_experts)}"
        ]

    def _idle(self, state: _LayerState, layer: str) -> list[str]:
        long_E = state.idle_judgements_E >= PATIENCE
        # Once reported, it lasts until no expert is idle.
        bad = bool((state.count_E == 0).any()) if state.idle.on else bool(long_E.any())
        if not state.idle.begins(bad, patience=1):
            return []
        return [
            f"has {int(long_E.sum())} of {long_E.numel()} experts that stay idle: no token where "
            f"{state.missed_E[long_E].min():,.0f} would be fair; {self._remedy(layer, long_E.numel())}, "
            "or drop them with nmt experts RUN --prune"
        ]

    def _dominance(self, state: _LayerState, layer: str, gate: GateFigures, token_loss: float) -> list[str]:
        weights = self._weights(layer, state.count_E.numel())
        losses = dict(zip(weights, (gate.importance_loss, gate.load_loss), strict=False))
        share = sum(losses.values()) / max(token_loss, _LEAST_TOKEN_LOSS)
        # Where a gate leans, high balance losses are what it needs.
        state.dominated.append(share > _DOMINANT_SHARE and state.concentration < 0.5)
        if not state.dominance.begins(2 * sum(state.dominated) > PATIENCE == len(state.dominated), patience=1):
            return []
        mean = sum(losses.values()) / len(losses)
        lower = {name: weight / _STEP for name, weight in weights.items() if losses[name] >= mean}
        return [
            f"balances more than it learns: balance losses of {sum(losses.values()):.2f} against a token loss of "
            f"{token_loss:.2f}; {_new_run(lower, weights)}"
        ]

    def _weights(self, layer: str, num_experts: int) -> dict[str, float]:
        """Return the balance weights, by setting, that have a gradient for this gate: importance, and maybe load."""
        importance, load = self.moe.balance_settings(layer).items()
        load_has_gradient = self.moe.is_noisy and self.moe.experts_per_token < num_experts
        return dict([importance, load] if load_has_gradient else [importance])

    def _remedy(self, layer: str, num_experts: int) -> str:
        weights = self._weights(layer, num_experts)
        raised = {name: min(weight * _STEP or _FIRST_WEIGHT, _LARGEST_WEIGHT) for name, weight in weights.items()}
        raised = {name: weight for name, weight in raised.items() if weight > weights[name]}
        if raised:
            return _new_run(raised, weights)
        return "start a new run with a lower training.learning_rate or a smaller model.moe.num_experts"


def _new_run(new: Mapping[str, float], now: Mapping[str, float]) -> str:
    # A run keeps its balance weights (nmt/run.py): every remedy is for the next one.
    settings = " ".join(f"{name}={weight:g}" for name, weight in new.items())
    return f"start a new run with {settings} (now {', '.join(f'{now[name]:g}' for name in new)})"
