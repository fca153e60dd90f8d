"""BLEU, chrF and TER by sacreBLEU, with the signatures that identify comparable scores."""

import difflib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import sacrebleu
from sacrebleu.significance import PairedTest, Result

from nmt.errors import DataError, UserError
from nmt.evaluation.multi_bleu import multi_bleu

BOOTSTRAP_SAMPLES, RANDOMISATION_TRIALS, SEED = 1000, 10_000, 12345
"""sacreBLEU's own numbers and seed of the paired tests."""
_SEED_VARIABLE = "SACREBLEU_SEED"
_DOWNLOAD_SECONDS = 60.0  # without an answer
_MOST_DRAWN = 1 << 22  # numbers of drawn sentences that are kept at a time

Metrics = dict[str, sacrebleu.BLEU | sacrebleu.CHRF | sacrebleu.TER]


@dataclass(frozen=True)
class Score:
    """One corpus-level score."""

    name: str
    value: float
    signature: str
    """What identifies comparable scores: key:value, separated by |."""
    details: str = ""
    """Of BLEU and multi-bleu: precisions, brevity penalty and lengths."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of sacreBLEU's JSON output, with the score in full: name, score, signature and its parts."""
        parts = dict(part.split(":", 1) for part in self.signature.split("|"))
        details = {"verbose_score": self.details} if self.details else {}
        return {"name": self.name, "score": self.value, "signature": self.signature, **details, **parts}

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
    return _scored(_metrics(tokenizer), hypotheses, references)


def all_scores(
    hypotheses: list[str],
    references: Sequence[list[str]],
    tokenizer: str,
    lowercase: bool = False,
    ter: bool = False,
) -> list[Score]:
    """Return [BLEU, chrF2, chrF2++, TER if requested, multi-bleu] of the text that `corpus_scores` takes.

    These are the scores of sacreBLEU's command line with the same `--tokenize` and `--lowercase`, which concern BLEU
    only. multi-bleu is that of the paper, on the tokens of BLEU. TER is slow: a second per 100 sentences, or so.
    """
    _check_pairs(hypotheses, references)
    bleu = sacrebleu.BLEU(tokenize=tokenizer, lowercase=lowercase)
    metrics: Metrics = {"BLEU": bleu, "chrF2": sacrebleu.CHRF(), "chrF2++": sacrebleu.CHRF(word_order=2)}
    scores = _scored(metrics | ({"TER": sacrebleu.TER()} if ter else {}), hypotheses, references)
    tokenised, *others = (map(bleu._preprocess_segment, lines) for lines in (hypotheses, *references))
    paper = multi_bleu(tokenised, others)
    signature = scores[0].signature.replace("smooth:exp", "smooth:none")
    return [*scores, Score("multi-bleu", paper.score, signature, paper.details)]


def _scored(metrics: Metrics, hypotheses: list[str], references: Sequence[list[str]]) -> list[Score]:
    scores = []
    for name, metric in metrics.items():
        found = metric.corpus_score(hypotheses, references)
        signature = str(metric.get_signature())
        details = json.loads(found.format(signature=signature, is_json=True)).get("verbose_score", "")
        scores.append(Score(name, found.score, signature, details))
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


def tokenized(texts: Sequence[str], tokenizer: str) -> list[list[str]]:
    """Return the tokens that BLEU counts in each text."""
    split = sacrebleu.BLEU(tokenize=tokenizer).tokenizer
    return [split(text.rstrip()).split() for text in texts]


def _interval(result: Result) -> tuple[float, float]:
    assert result.mean is not None
    assert result.ci is not None
    return float(result.mean - result.ci), float(result.mean + result.ci)


def named_set(name: str, languages: str) -> list[str]:
    """Return the files of a set that sacreBLEU knows by name, such as wmt14: the source, then the references.

    They are in sacreBLEU's cache, or are downloaded into it. `languages` is such as "en-de". UserError for a name or
    languages that sacreBLEU does not have; DataError if the text is not in the cache and cannot be downloaded.
    """
    known = sacrebleu.get_available_testsets()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--set {name}: sacreBLEU has no such set{hint} (sacrebleu --list -l {languages})")
    pairs = sacrebleu.get_langpairs_for_testset(name)
    if languages not in pairs:
        raise UserError(f"--set {name} has no {languages}, the languages of the run, but {', '.join(sorted(pairs))}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        return [sacrebleu.get_source_file(name, languages), *sacrebleu.get_reference_files(name, languages)]
    except (Exception, SystemExit) as error:  # sacreBLEU raises what it meets, and exits for a wrong checksum
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(
            f"--set {name}: its text is not in sacreBLEU's cache, {sacrebleu.SACREBLEU_DIR}, and was not downloaded "
            f"({reason}): with a network, sacrebleu --download {name} -l {languages} puts it there"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


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
