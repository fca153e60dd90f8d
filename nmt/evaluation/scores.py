"""BLEU and chrF by sacreBLEU, with the signatures that make them comparable."""

from dataclasses import dataclass

import sacrebleu

from nmt.errors import DataError


@dataclass(frozen=True)
class Score:
    """One corpus-level score."""

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f}  {self.signature}"


def corpus_scores(hypotheses: list[str], references: list[str]) -> list[Score]:
    """[BLEU, chrF] of detokenised text: sacreBLEU's defaults, cased BLEU with 13a tokenisation, and chrF2.

    DataError if the two counts differ (sacreBLEU's own functions would score what they have) or nothing is there.
    """
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} translations but {len(references)} references: they must pair line by line")
    if not references:
        raise DataError("no sentences to score")
    scores = []
    for name, metric in (("BLEU", sacrebleu.BLEU()), ("chrF2", sacrebleu.CHRF())):
        value = metric.corpus_score(hypotheses, [references]).score
        scores.append(Score(name, value, str(metric.get_signature())))
    return scores
