"""The comparison of systems as a self-contained HTML page, light or dark like the reader's system.

Sentences may be of any script and come from anybody: they are escaped, and each has its own direction.
"""

from collections.abc import Sequence

from nmt.evaluation.compare import (
    KEPT_NAMES,
    LEAST_SENTENCES,
    LOWER_IS_BETTER,
    MOST_PAIRS,
    SENTENCE_METRIC,
    BucketScores,
    Compared,
    Interval,
    Pair,
    Result,
    ScoredGrouping,
)
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, RANDOMISATION_TRIALS, SEED
from nmt.pages.charts import interval
from nmt.pages.document import document, text
from nmt.pages.style import COMPARISON, PANELS
from nmt.text.words import differences
from nmt.wording import counted, percent

_LONGEST = 5000  # characters of a sentence that are shown
_TESTS = (
    f"Intervals are 95 % intervals over {BOOTSTRAP_SAMPLES:,} test sets drawn from this one; p is the probability of a "
    f"difference this large by chance, by sacreBLEU's paired bootstrap ({BOOTSTRAP_SAMPLES:,} samples) and approximate "
    f"randomisation ({RANDOMISATION_TRIALS:,} trials), seed {SEED}. In the figures, the line is the interval of the "
    "difference, and the dot is the difference: blue if the whole interval is better than A, orange if it is worse."
)
_BUCKETS = (
    f"A bucket of fewer than {LEAST_SENTENCES} sentences is not scored. By chance alone, one interval of 20 misses "
    "zero. All figures in a column have the same scale."
)


def comparison_page(compared: Compared) -> str:
    """Return the whole page."""
    names = [system.name for system in compared.systems]
    title = f"{', '.join(names[1:])} against {names[0]}"
    sections = [("scores", "Scores", _scores(compared)), ("buckets", "Buckets", _buckets(compared))]
    for place in range(1, len(names)):
        sections.append(
            (f"sentences-{letter(place)}", f"Sentences: {letter(place)} against A", _sentences(compared, place))
        )
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    bodies = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>\n' for name, heading, content in sections
    )
    subject = f"{compared.text.title}, {counted(len(compared.text.sources), 'sentence')}"
    subject += f", {counted(len(compared.text.references), 'reference')}"
    body = f"<h1><bdi>{text(title)}</bdi></h1><p class=soft><bdi>{text(subject)}</bdi></p><nav>{links}</nav>\n{bodies}"
    return document(title, body, PANELS, COMPARISON)


def letter(place: int) -> str:
    """Return the letter of system number `place`, from 0: A for the baseline."""
    return chr(ord("A") + place)


# ------------------------------------------------------------------------------------------------- scores


def _scores(compared: Compared) -> str:
    rows = [
        f"<tr><td>{letter(place)}</td><td class=name><bdi>{text(system.name)}</bdi></td>"
        f"<td class=name><bdi>{text(system.origin)}</bdi></td></tr>"
        for place, system in enumerate(compared.systems)
    ]
    known = (
        f"<div class=wide><table><tr><th></th><th>system</th><th>translations</th></tr>{''.join(rows)}</table></div>"
    )
    head = "<th>metric</th><th>system</th><th class=n>score</th><th>95 %</th><th class=n>difference from A</th>"
    head += "<th>95 %</th><th></th><th class=n>p, bootstrap</th><th class=n>p, randomisation</th>"
    lines = []
    for metric, results in compared.overall.items():
        widest = _widest([each.result for each in results])
        for place, each in enumerate(results):
            begin = f"<td>{_title(metric)}</td>" if not place else "<td></td>"
            cells = f"{begin}<td>{letter(place)}</td><td class=n>{each.result.score:.2f}</td>"
            cells += f"<td>{_span(each.score_interval, '.2f')}</td>"
            if place:
                cells += _difference(metric, each.result, widest)
                cells += f"<td class=n>{each.bootstrap:.4f}</td><td class=n>{each.randomisation:.4f}</td>"
            else:
                cells += "<td></td>" * 5
            lines.append(f"<tr{' class=first' if not place else ''}>{cells}</tr>")
    signatures = "".join(
        f"<p class=how>{text(metric)}: <code>{text(signature)}</code></p>"
        for metric, signature in compared.signatures.items()
    )
    table = f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"
    return f"{known}{table}<p class=how>{_TESTS}</p>{signatures}{_kept(compared)}"


def _kept(compared: Compared) -> str:
    """Return a table of what each system kept of the sources."""
    if not compared.kept:
        return ""
    head = "".join(f"<th class=n>{letter(place)}</th>" for place in range(len(compared.systems)))
    rows = "".join(
        f"<tr><td>{KEPT_NAMES[kind]}</td><td class=n>{counts[0].total:,}</td>"
        + "".join(f"<td class=n>{percent(each.kept / each.total)}</td>" for each in counts)
        + "</tr>"
        for kind, counts in compared.kept.items()
    )
    return (
        "<h2 class=sub>Kept from the source</h2><div class=wide><table><tr><th></th><th class=n>in the sources</th>"
        f"{head}</tr>{rows}</table></div>"
    )


def _title(metric: str) -> str:
    return f"{text(metric)} (lower is better)" if metric in LOWER_IS_BETTER else text(metric)


def _widest(results: Sequence[Result]) -> float:
    return max((abs(bound) for result in results for bound in (*result.interval, result.difference)), default=0.0)


def _span(bounds: Interval, form: str) -> str:
    low, high = bounds
    return f"{low:{form}} to {high:{form}}"


def _difference(metric: str, result: Result, widest: float) -> str:
    """Return cells of the difference, its interval and their figure."""
    low, high = result.interval
    side = (low > 0) - (high < 0)
    kind = {0: "", 1: "gain", -1: "loss"}[-side if metric in LOWER_IS_BETTER else side]
    figure = interval(result.difference, low, high, widest, kind)
    span = _span(result.interval, "+.2f")
    return f"<td class=n>{result.difference:+.2f}</td><td>{span}</td><td class=plot>{figure}</td>"


# ------------------------------------------------------------------------------------------------- buckets


def _buckets(compared: Compared) -> str:
    tables = "".join(_grouping(compared, grouping) for grouping in compared.groupings)
    return f"<p class=how>{_BUCKETS}</p>{tables}"


def _grouping(compared: Compared, grouping: ScoredGrouping) -> str:
    metrics, others = list(compared.overall), len(compared.systems) - 1
    scored = [bucket.results for bucket in grouping.buckets if bucket.results]
    widest = {metric: _widest([each for results in scored for each in results[metric]]) for metric in metrics}
    groups = "".join(f"<th class='group scores' colspan=5>{_title(metric)}</th>" for metric in metrics)
    kinds = "<th class='n scores'>A</th><th class=n>{}</th><th class=n>difference</th><th>95 %</th><th></th>"
    kinds = kinds.format("B" if others == 1 else "system") * len(metrics)
    which = "" if others == 1 else "<th>system</th>"
    head = f"<tr><th></th><th></th>{'' if others == 1 else '<th></th>'}{groups}</tr>"
    head += f"<tr><th>bucket</th><th class=n>sentences</th>{which}{kinds}</tr>"
    lines = "".join(_bucket(bucket, metrics, others, widest) for bucket in grouping.buckets)
    return (
        f"<h2 class=sub>{text(grouping.title)}</h2><p class=how>{text(grouping.note)}</p>"
        f"<div class=wide><table>{head}{lines}</table></div>"
    )


def _bucket(bucket: BucketScores, metrics: Sequence[str], others: int, widest: dict[str, float]) -> str:
    begin = f"<td class=name><bdi>{text(bucket.label)}</bdi></td><td class=n>{bucket.sentences:,}</td>"
    if not bucket.results:
        columns = 5 * len(metrics) + (others > 1)
        return f"<tr class='first few'>{begin}<td class=scores colspan={columns}>too few sentences to score</td></tr>"
    lines = []
    for place in range(1, others + 1):
        cells = begin if place == 1 else "<td></td><td></td>"
        cells += "" if others == 1 else f"<td>{letter(place)}</td>"
        for metric in metrics:
            results = bucket.results[metric]
            cells += f"<td class='n scores'>{results[0].score:.2f}</td><td class=n>{results[place].score:.2f}</td>"
            cells += _difference(metric, results[place], widest[metric])
        lines.append(f"<tr{' class=first' if place == 1 else ''}>{cells}</tr>")
    return "".join(lines)


# ------------------------------------------------------------------------------------------------- sentences


def _sentences(compared: Compared, place: int) -> str:
    versus = compared.versus[place - 1]
    size = len(compared.text.sources)
    figures = (
        (versus.better, f"sentences better than A by {SENTENCE_METRIC}"),
        (versus.worse, "sentences worse"),
        (size - versus.better - versus.worse, "sentences with the same score"),
        (versus.identical, "identical translations"),
    )
    tiles = "".join(f"<div><b>{count:,}</b><span>{name}</span></div>" for count, name in figures)
    names = "".join(
        f"<div>{letter(system)}: <bdi>{text(compared.systems[system].name)}</bdi></div>" for system in (0, place)
    )
    found = f"<div class=how>{names}</div><div class=tiles>{tiles}</div>"
    for heading, pairs in (("Largest wins", versus.wins), ("Largest losses", versus.losses)):
        shown = "".join(_pair(compared, place, pair) for pair in pairs) or "<p class=soft>None.</p>"
        found += f"<h2 class=sub>{heading}</h2><p class=how>{_how(pairs)}</p>{shown}"
    return found


def _how(pairs: Sequence[Pair]) -> str:
    most = f"The {len(pairs)} sentences" if len(pairs) == MOST_PAIRS else counted(len(pairs), "sentence")
    return (
        f"{most} with the largest difference in {SENTENCE_METRIC}. Words in which the translations differ are marked."
    )


def _pair(compared: Compared, place: int, pair: Pair) -> str:
    systems, here = compared.systems, pair.place
    texts = [_cut(systems[system].hypotheses[here]) for system in (0, place)]
    rows = [("source", text(_cut(compared.text.sources[here])))]
    rows += [("reference", text(_cut(references[here]))) for references in compared.text.references]
    marked = (
        "".join(f"<mark>{text(part)}</mark>" if differs else text(part) for part, differs in side)
        for side in differences(*texts)
    )
    rows += [
        (letter(system), content or "<i class=soft>empty</i>")
        for system, content in zip((0, place), marked, strict=True)
    ]
    listed = "".join(f'<dt>{name}</dt><dd dir="auto">{content}</dd>' for name, content in rows)
    difference = pair.system - pair.baseline
    kind = "gain" if difference > 0 else "loss"
    return (
        f"<article class=pair><header>line {here + 1:,}: {pair.baseline:.1f} → {pair.system:.1f}"
        f"<b class={kind}>{difference:+.1f}</b></header><dl>{listed}</dl></article>"
    )


def _cut(sentence: str) -> str:
    """Return a sentence, or the beginning of a very long one."""
    if len(sentence) <= _LONGEST:
        return sentence
    return f"{sentence[:_LONGEST]}… ({len(sentence) - _LONGEST:,} more characters)"
