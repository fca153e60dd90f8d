"""BLEU and chrF by sacreBLEU, with the signatures that make them comparable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sacrebleu
from sacrebleu.significance import PairedTest, Result

from nmt.errors import DataError

_SEED_VARIABLE = "SACREBLEU_SEED"


@dataclass(frozen=True)
class Score:
    """One corpus-level score."""

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f}  {self.signature}"


@dataclass(frozen=True)
class Comparison:
    """One score of two systems on the same sentences."""

    name: str
    baseline: float
    system: float
    p_value: float
    """How probable so large a difference would be by the choice of sentences alone; 1 where the scores are equal."""
    baseline_interval: tuple[float, float]
    """95%, over resampled test sets."""
    system_interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """What the system gains over the baseline."""
        return self.system - self.baseline


def corpus_scores(hypotheses: list[str], references: list[str]) -> list[Score]:
    """[BLEU, chrF] of detokenised text: sacreBLEU's defaults, cased BLEU with 13a tokenisation, and chrF2.

    DataError if the two counts differ (sacreBLEU's own functions would score what they have) or nothing is there.
    """
    _check_pairs(hypotheses, references)
    scores = []
    for name, metric in (("BLEU", sacrebleu.BLEU()), ("chrF2", sacrebleu.CHRF())):
        value = metric.corpus_score(hypotheses, [references]).score
        scores.append(Score(name, value, str(metric.get_signature())))
    return scores


def paired_bootstrap(
    baseline: list[str], system: list[str], references: list[str], samples: int = 1000, seed: int = 12345
) -> list[Comparison]:
    """[BLEU, chrF] of two systems by sacreBLEU's paired bootstrap (Koehn 2004): `samples` test sets drawn with
    replacement from this one, the same for both. `seed` is at least 1.

    Deviation: sacreBLEU gives equal scores the least p-value there is, 1/(samples + 1); here it is 1. DataError as in
    `corpus_scores`.
    """
    _check_pairs(baseline, references)
    _check_pairs(system, references)
    metrics = {"BLEU": sacrebleu.BLEU(references=[references]), "chrF2": sacrebleu.CHRF(references=[references])}
    with _environment(_SEED_VARIABLE, str(seed)):
        _, results = PairedTest([("baseline", baseline), ("system", system)], metrics, None, "bs", samples)()
    comparisons = []
    for name in metrics:
        before, after = results[name]
        assert isinstance(before, Result)
        assert isinstance(after, Result)
        assert after.p_value is not None
        p_value = 1.0 if before.score == after.score else after.p_value
        comparisons.append(Comparison(name, before.score, after.score, p_value, _interval(before), _interval(after)))
    return comparisons


def _interval(result: Result) -> tuple[float, float]:
    assert result.mean is not None
    assert result.ci is not None
    return float(result.mean - result.ci), float(result.mean + result.ci)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    # The only way to give sacreBLEU's bootstrap a seed.
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_pairs(hypotheses: list[str], references: list[str]) -> None:
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} translations but {len(references)} references: they must pair line by line")
    if not references:
        raise DataError("no sentences to score")
