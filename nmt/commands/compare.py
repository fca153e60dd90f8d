"""nmt compare: translations of one test set by two or more systems, which are runs or files of translations."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.commands import Parser, is_setting, say, show
from nmt.commands.direction import asked_direction, directions_of, is_given
from nmt.commands.keep import keep
from nmt.config import TOKENIZERS, Config, Direction, LayerName
from nmt.decoding.loading import load_vocabulary
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, DataError, UserError
from nmt.evaluation.buckets import Grouping, by_label, by_length, by_numbers, by_rare_words
from nmt.evaluation.compare import KEPT_NAMES, Compared, System, compare
from nmt.evaluation.frequency import source_frequencies, training_frequencies
from nmt.evaluation.kept import kept_translations
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, RANDOMISATION_TRIALS, SEED
from nmt.evaluation.sets import EvaluationSet, by_direction, evaluation_set, read_lines
from nmt.evaluation.tokenizers import Tokenizer, bleu_tokenizer, misfit
from nmt.experts.observe import most_used
from nmt.files import write_atomically
from nmt.pages.compare import comparison_page
from nmt.run import RunDirectory
from nmt.wording import counted, percent, steps_of

_MOST_SYSTEMS, _MOST_SENTENCES = 26, 10_000
_LONGEST_NAME = 80


class _Candidate(NamedTuple):
    """A system as the command line names it."""

    name: str
    run: RunDirectory | None
    """None: `path` is a file of translations."""
    config: Config
    """Of the run."""
    path: str


def parser() -> Parser:
    """Options of `nmt compare`."""
    parser = Parser(
        "compare",
        "Compare translations of one test set by several systems: scores with significance tests, scores of buckets\n"
        "of sentences, and the largest wins and losses. A SYSTEM is a run, or a file of translations. The first is\n"
        "the baseline. Settings for one run alone follow its name: RUN,KEY=VALUE,...",
        "  nmt compare runs/demo runs/demo-32\n"
        "  nmt compare demo demo,decoding.beam_size=1 demo,decoding.checkpoint=last -o beams.html\n"
        "  nmt compare first.de second.de --source my.en --reference my.de -o page.html --json scores.json\n"
        "  nmt compare demo other.de --source my.en --reference my.de --domains my.domains decoding.beam_size=8\n"
        "  nmt compare many demo --from en --to de",
        takes_run=False,
    )
    parser.add_argument("systems", metavar="SYSTEM", nargs="+", help="run, or file of translations; the baseline first")
    parser.add_argument("--source", metavar="F", help="sentences of the test set (default: the first run's own set)")
    parser.add_argument(
        "--reference",
        metavar="F",
        action="append",
        default=[],
        help="their translations, line by line; repeat it for several references",
    )
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which of the run's own sets")
    parser.add_direction()
    parser.add_argument("--domains", metavar="F", help="the domain of each sentence, line by line")
    parser.add_argument("--layer", metavar="NAME", help="MoE layer of the first system, for buckets by expert")
    parser.add_argument(
        "--tokenize",
        choices=TOKENIZERS,
        help="tokeniser of BLEU, as in sacreBLEU (default: evaluation.tokenize of the first run)",
    )
    parser.add_argument("--ter", action="store_true", help="also compare TER, which is slow")
    parser.add_argument("-o", "--output", metavar="PAGE", help="HTML page (default: in the first run's report folder)")
    parser.add_argument("--json", metavar="F", help="write all figures to this file")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the comparison, and write it as a page."""
    changes = [word for word in options.systems if is_setting(word)]
    candidates = _named([_candidate(word, changes) for word in options.systems if word not in changes])
    if not 2 <= len(candidates) <= _MOST_SYSTEMS:
        raise UserError(f"{counted(len(candidates), 'system')}: give 2 to {_MOST_SYSTEMS}, the baseline first")
    _check_outputs(options, candidates)
    first = next((each for each in candidates if each.run is not None), None)
    if first is None and (options.source is None or not options.reference):
        raise UserError("files of translations need --source F and --reference F, the text that they translate")
    if first is None and changes:
        raise UserError(f"{changes[0]}: settings are for runs, and all systems are files; leave it out")
    text = _text(options, candidates, first)
    if len(text.sources) > _MOST_SENTENCES:
        raise DataError(
            f"{text.title} has {len(text.sources):,} sentences: compare at most {_MOST_SENTENCES:,}, as the tests keep "
            "all samples in memory; cut the files"
        )
    for note in text.notes:
        say(note)
    tokenizer = _tokenizer(options.tokenize, first, text.direction)
    doubt = misfit(tokenizer.name, text.references[0], "--tokenize ")
    if doubt:
        say(doubt)
    layer = _layer(options.layer, candidates[0])
    domains = _domains(options.domains, text)
    systems = [_system(each, text, options.split) for each in candidates]
    groupings = _groupings(text, domains, first, layer, candidates[0], systems[0])
    compared = compare(text, systems, groupings, tokenizer.name, options.ter)
    _print(compared, str(tokenizer))
    _write(options, compared, first.run if first else None)


def _text(options: argparse.Namespace, candidates: Sequence[_Candidate], first: _Candidate | None) -> EvaluationSet:
    """Return the test set, in a direction that all runs translate. `first` is the first run."""
    text = evaluation_set(options.source, options.reference, options.split, first.run if first else None)
    runs = [(each.run, each.config) for each in candidates if each.run is not None]
    if not runs:
        if is_given(options) or options.tag:
            raise UserError("--from, --to and --tag are for runs, and all systems are files: leave them out")
        return text
    known = {run.path: directions_of(run, config) for run, config in runs}
    found = [(directions, asked_direction(options, directions)) for directions in known.values()]
    directions, direction = found[0]
    for other, theirs in found:
        if theirs != direction:
            raise UserError(
                f"{directions.name} translates {direction}, but {other.name} {theirs}: give --from and --to"
            )
    # A run of a single direction takes its name, too.
    several = next((each for each, _ in found if each.are_several), directions)
    return by_direction(text, several, direction, options.tag)[0]


def _tokenizer(name: str | None, first: _Candidate | None, direction: Direction | None) -> Tokenizer:
    """Return the tokeniser with this name; None: that of the first run, if there is one."""
    language = (direction or first.config.corpus.direction).target if first else ""
    if name is not None:
        return bleu_tokenizer(name, language, "--tokenize ")
    return bleu_tokenizer(first.config.evaluation.tokenize if first else "auto", language)


# ------------------------------------------------------------------------------------------------- systems


def _candidate(word: str, changes: Sequence[str]) -> _Candidate:
    """Return the system that a word names; `changes` are settings of all runs. CheckpointError if it is neither."""
    name, *own = word.split(",")
    while own and not is_setting(own[0]):
        name = f"{name},{own.pop(0)}"  # a comma in the name
    if wrong := [setting for setting in own if not is_setting(setting)]:
        raise UserError(f"{word}: {wrong[0]} is not a setting KEY=VALUE")
    if Path(name).exists() and not Path(name).is_dir():  # pipes are files, too
        if own:
            raise UserError(f"{word}: {name} is a file of translations, to which no setting applies")
        return _Candidate(Path(name).name, None, Config(), name)
    try:
        run = RunDirectory.existing(name)
    except CheckpointError as error:
        if Path(name).exists() or (Path("runs") / name).exists():
            raise
        raise CheckpointError(f"{name} is neither a file of translations nor a run: {error}") from error
    settings = f" ({', '.join(own)})" if own else ""
    return _Candidate(f"{run.path.resolve().name}{settings}", run, run.config([*changes, *own]), name)


def _named(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return the systems with names that differ: paths instead of names if needed, and then numbers."""
    names = Counter(each.name for each in candidates)
    found: list[_Candidate] = []
    for each in candidates:
        name = each.name if names[each.name] == 1 or each.run is not None else each.path
        name = " ".join(name.split())  # a file's name may have line breaks
        same = sum(name == other.name.rpartition(" #")[0] or name == other.name for other in found)
        found.append(each._replace(name=f"{name} #{same + 1}" if same else name))
    return found


def _system(candidate: _Candidate, text: EvaluationSet, split: str) -> System:
    """Return the translations of a system: those in its file, those that its run has kept, or new ones."""
    run, config = candidate.run, candidate.config
    if run is None:
        hypotheses, notes = read_lines(candidate.path)
        if len(hypotheses) != len(text.sources):
            raise DataError(
                f"{candidate.path} has {counted(len(hypotheses), 'line')} but {text.title} has {len(text.sources):,}: "
                "they must pair line by line"
            )
        for note in notes:
            say(note)
        return System(candidate.name, f"file {candidate.path}", hypotheses)
    if text.own and not _has(run, text, split):
        say(f"{run.path} has another {split} set of its own: it translates that of the first run")
    steps = [step for checkpoint in run.chosen(config.decoding) for step in checkpoint.steps]
    origin = f"{run.path}, {steps_of(steps)}, beam {config.decoding.beam_size}, alpha {config.decoding.alpha}"
    origin += f", beta {config.decoding.beta}"
    kept = kept_translations(run, text, config.decoding)
    if kept is not None:
        say(f"{candidate.name}: translations kept by nmt evaluate")
        return System(candidate.name, origin, kept)
    say(f"{candidate.name}: translating {counted(len(text.sources), 'sentence')}, which nmt evaluate has not kept")
    translator = Translator.load(run, config)
    translations = translator.translate(text.sources, text.options(translator.options))
    return System(candidate.name, origin, [each.text for each in translations])


def _has(run: RunDirectory, text: EvaluationSet, split: str) -> bool:
    """Return whether a run has this text as its own, or none at all."""
    sources, directions = run.text(split)[0], run.directions(split)
    if directions:
        sources = [source for source, each in zip(sources, directions, strict=True) if each == text.direction]
    return not sources or sources == text.sources


# ------------------------------------------------------------------------------------------------- buckets


def _layer(wanted: str | None, baseline: _Candidate) -> str | None:
    """Return the MoE layer for buckets by expert: the wanted one, else the baseline's last one in the encoder.

    None if the baseline has no MoE layer. UserError if there is no wanted one.
    """
    layers = [] if baseline.run is None else baseline.config.model.moe_layer_names()
    if wanted is not None and wanted not in layers:
        known = ", ".join(layers) or "no MoE layer"
        raise UserError(f"--layer {wanted}: {baseline.name}, the first system, has {known}")
    # The experts of an encoder layer depend on the source alone.
    return wanted or max(layers, key=lambda name: LayerName.of(name).side == "encoder", default=None)


def _domains(path: str | None, text: EvaluationSet) -> list[str]:
    """Return the domain of each sentence; empty if unknown. DataError if the file has other lines than the set."""
    if path is None:
        return text.domains
    domains, notes = read_lines(path)
    if len(domains) != len(text.sources):
        raise DataError(
            f"--domains {path} has {counted(len(domains), 'line')} but {text.title} has {len(text.sources):,}: "
            "give the domain of each sentence on its line"
        )
    for note in notes:
        say(note)
    return domains


def _groupings(
    text: EvaluationSet,
    domains: list[str],
    first: _Candidate | None,
    layer: str | None,
    baseline: _Candidate,
    translated: System,
) -> list[Grouping]:
    """Return all groupings that are possible. `first` is the first run, and `translated` has the baseline's text."""
    sources, frequencies = text.sources, None
    if first is not None and first.run is not None:
        subwords = load_vocabulary(first.run)
        frequencies = training_frequencies(first.run, first.config, subwords, text.direction)
        if frequencies is not None:
            sources = [subwords.normalise(source) for source in sources]
    rare = by_rare_words(sources, *(frequencies or source_frequencies(sources)))
    groupings = [by_length(text.sources), rare, by_numbers(text.sources)]
    if domains:
        groupings.append(by_label("domain", "Domain", "Domains that the test set is labelled with.", domains))
    if layer is not None and baseline.run is not None:
        translator = Translator.load(baseline.run, baseline.config)
        read = translator.pairs(text.sources, translated.hypotheses, text.options(translator.options))
        found = most_used(
            translator.model,
            translator.subwords,
            read.sources,
            read.targets,
            layer,
            baseline.config.decoding.experts_per_token,
            read.symbols,
        )
        labels = ["no expert" if expert < 0 else f"expert {expert}" for expert in found]
        side = "source" if LayerName.of(layer).side == "encoder" else "translation by A"
        note = f"The expert of {layer} in A with the largest sum of gate values over the subwords of the {side}."
        groupings.append(by_label("expert", "Most-used expert", note, labels))
    return groupings


# ------------------------------------------------------------------------------------------------- results


def _print(compared: Compared, tokenizer: str) -> None:
    show(compared)
    for versus, system in zip(compared.versus, compared.systems[1:], strict=True):
        show(f"{system.name}: {versus}")
    for kind, counts in compared.kept.items():
        shares = ", ".join(
            f"{system.name} {percent(each.kept / each.total)}"
            for system, each in zip(compared.systems, counts, strict=True)
        )
        show(f"{KEPT_NAMES[kind]} kept, of {counts[0].total:,} in the sources: {shares}")
    for metric, signature in compared.signatures.items():
        show(f"{metric}: {signature}")
    show(tokenizer)
    tests = (
        f"{BOOTSTRAP_SAMPLES:,} samples of the bootstrap, {RANDOMISATION_TRIALS:,} of the randomisation, seed {SEED}"
    )
    show(f"{counted(len(compared.text.sources), 'sentence')} of {compared.text.title}; {tests}")


def _write(options: argparse.Namespace, compared: Compared, run: RunDirectory | None) -> None:
    """Write the page and the JSON file."""
    page = comparison_page(compared)
    if options.output is not None:
        write_atomically(Path(options.output), page.encode())
        say(f"the page is {options.output}")
    elif run is not None:
        # The page is in the folder of the first run, so that its name alone adds nothing.
        names = [system.name for system in compared.systems if system.name != run.path.resolve().name]
        slug = re.sub(r"[^A-Za-z0-9._=]+", "-", "-".join(names).replace("decoding.", "")).strip("-")[:_LONGEST_NAME]
        name = compared.text.report(f"compare-{slug}", "html")
        keep(run, {name: page}, f"the page is {run.report / name}")
    else:
        say("no page was written: name it with -o")
    if options.json is not None:
        content = json.dumps(compared.to_dict(), indent=2, ensure_ascii=False)
        write_atomically(Path(options.json), f"{content}\n".encode())


def _check_outputs(options: argparse.Namespace, candidates: Sequence[_Candidate]) -> None:
    """Raise UserError if a file to be written is one that is read, or both are the same."""
    read = [options.source, *options.reference, options.domains, *(each.path for each in candidates if not each.run)]
    taken = {Path(name).resolve() for name in read if name is not None}
    for option, name in (("-o", options.output), ("--json", options.json)):
        if name is None:
            continue
        if Path(name).resolve() in taken:
            raise UserError(f"{option} {name} is also another file of this command: name a new file")
        taken.add(Path(name).resolve())
