"""The dial: quality and cost of a trained model with fewer or more experts per token."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from nmt.config import Config, MoEConfig
from nmt.cost.operations import model_cost
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.measure import Measured, measure
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, SEED, Comparison, corpus_scores, paired_bootstrap
from nmt.evaluation.sets import EvaluationSet
from nmt.wording import counted

HEAD = (
    "experts/token  ops/timestep  sentences/s  BLEU (95 %)            chrF2  perplexity  BLEU against trained\n"
    "-------------  ------------  -----------  --------------------  ------  ----------  --------------------"
)
"""Heading of the table; its lines are `DialPosition.row`."""


@dataclass(frozen=True)
class DialPosition:
    """Results with one number of experts per token."""

    experts_per_token: int
    trained: bool
    """True for the number used in training. A strictly balanced gate then uses its thresholds; the number is a mean."""
    ops_per_timestep: int
    measured: Measured
    comparisons: list[Comparison]
    """BLEU and chrF compared with those of the number used in training."""

    @property
    def label(self) -> str:
        """Name in the table."""
        return f"{self.experts_per_token}{' trained' if self.trained else ''}"

    @property
    def sentences_per_second(self) -> float:
        """Speed of translation."""
        return len(self.measured.hypotheses) / self.measured.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON has them."""
        return {
            "experts_per_token": self.experts_per_token,
            "trained": self.trained,
            "ops_per_timestep": self.ops_per_timestep,
            "seconds": self.measured.seconds,
            "sentences_per_second": self.sentences_per_second,
            "scores": {score.name: score.value for score in self.measured.scores},
            "perplexity": self.measured.perplexity.pieces,
            "word_perplexity": self.measured.perplexity.words,
            "against_trained": [asdict(comparison) for comparison in self.comparisons],
        }

    def row(self) -> str:
        """Return a line of the table below `HEAD`."""
        bleu = self.comparisons[0]
        low, high = bleu.system_interval
        against = "" if self.trained else f"{bleu.difference:+.2f}, p = {bleu.p_value:.3f}"
        cells = (
            f"{self.label:<13}",
            f"{self.ops_per_timestep / 1e6:>11.2f}M",
            f"{self.sentences_per_second:>11,.1f}",
            f"{bleu.system:>6.2f} ({low:>5.2f}-{high:>5.2f})",
            f"{self.measured.scores[1].value:>6.2f}",
            f"{self.measured.perplexity.pieces:>10.3f}",
            against,
        )
        return "  ".join(cells).rstrip()


def dial_counts(text: str, config: Config) -> list[int]:
    """Return the numbers of experts per token in the argument of --dial. UserError if it is not allowed."""
    if not config.model.moe.num_experts:
        raise UserError("--dial needs a run with experts: model.moe.num_experts is 0")
    if config.decoding.experts_per_token:
        raise UserError(f"--dial and decoding.experts_per_token={config.decoding.experts_per_token}: give one of them")
    if not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", text.replace(" ", ""), re.ASCII):
        raise UserError(f"--dial {text!r}: give numbers of experts, at least 1, such as 1,2,4")
    return [int(number) for number in text.split(",")]


def dial_positions(counts: list[int], moe: MoEConfig) -> list[tuple[int, bool]]:
    """Return (experts per token, True if as in training), in order. The number in training is always included."""
    trained = moe.experts_per_token
    # If tokens have different numbers of experts in training, a fixed number equal to their mean is another position.
    positions = {(trained, True), *((count, False) for count in counts if moe.k_is_average or count != trained)}
    return sorted(positions, key=lambda position: (position[0], not position[1]))


def dial(
    counts: list[int],
    translator: Translator,
    text: EvaluationSet,
    tokenizer: str,
    config: Config,
    tell: Callable[[str], None],
) -> list[DialPosition]:
    """Return the results for each of `counts` and for the number used in training, in order.

    `tell` is called with a line after each. UserError for a number of experts that the gates cannot activate.
    """
    wanted = dial_positions(counts, config.model.moe)
    for count, trained in wanted:
        try:
            translator.model.check_experts_per_token(0 if trained else count)
        except ValueError as error:
            raise UserError(f"--dial: {error}") from error
    # Warm up: the first batch of a process takes longer.
    translator.translate(text.sources[:64], text.options(translator.options))
    measured = []
    for count, trained in wanted:
        options = replace(translator.options, experts_per_token=0 if trained else count)
        measured.append(measure(translator, text, partial(corpus_scores, tokenizer=tokenizer), config, options))
        done = f"{counted(len(text.sources), 'sentence')} in {measured[-1].seconds:.1f} s"
        tell(f"{counted(count, 'expert')} per token: {done}")
    baseline = measured[[trained for _, trained in wanted].index(True)].hypotheses
    positions = []
    for (count, trained), found in zip(wanted, measured, strict=True):
        model = replace(config.model, moe=config.model.moe.with_experts_per_token(count))
        ops = model_cost(model, translator.subwords.size).ops_per_timestep
        compared = paired_bootstrap(baseline, found.hypotheses, text.references, tokenizer, BOOTSTRAP_SAMPLES, SEED)
        positions.append(DialPosition(count, trained, ops, found, compared))
    return positions
