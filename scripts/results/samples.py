"""Translate a few lines of a set with several runs, and keep the experts of each word.

  python scripts/results/samples.py runs/queue/claim.seed_1.moe_4 runs/queue/claim.seed_1.moe_32 \\
    --source data/news/newstest2014.en.gz --reference data/news/newstest2014.fr.gz -o results/claim/samples.json

Without --lines, nobody picks the lines: of those with 10 to 25 words, it is the middle one of each fifth of the set.
Each run translates a line with its own settings of the search. Of a run with MoE layers, each word of the source has
its expert in the layers of the encoder, and each word of the translation in those of the decoder. This is the expert
with the largest sum of gates over the subwords of the word; its share is that sum over the sum of all gates. For each
layer, the three experts are kept without which the translation would be least probable: how many subwords chose them,
and how many nats it would lose (`nmt experts RUN --explain` explains these). Runs that are in the file stay in it, as
runs may come one by one. `samples` in a table of results makes a page of the file: scripts/results/pages.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import LayerName
from nmt.data.subwords import split_words
from nmt.decoding.parts import Reading
from nmt.decoding.translator import Found, Translator
from nmt.errors import DataError, UserError, exit_status
from nmt.evaluation.scores import SystemScores
from nmt.evaluation.sets import EvaluationSet, evaluation_set
from nmt.experts.explain import LayerExplanation, Scorer, explain_pair
from nmt.files import read_json, write_atomically
from nmt.run import RunDirectory
from nmt.tokens import EOS

SAMPLES, FEWEST_WORDS, MOST_WORDS = 5, 10, 25
_MOST_NEEDED = 3
_SEARCH = ("beam_size", "alpha", "beta")

Record = dict[str, Any]


def chosen_places(sources: Sequence[str]) -> list[int]:
    """The places of the lines described above, from 0 on. DataError if there are too few."""
    fit = [place for place, line in enumerate(sources) if FEWEST_WORDS <= len(line.split()) <= MOST_WORDS]
    if len(fit) < SAMPLES:
        raise DataError(
            f"only {len(fit)} lines have {FEWEST_WORDS} to {MOST_WORDS} words, and {SAMPLES} are needed: "
            "name some with --lines"
        )
    return [fit[(2 * number + 1) * len(fit) // (2 * SAMPLES)] for number in range(SAMPLES)]


def translated(translator: Translator, line: str) -> Record:
    """The translation of a line and, of a run with MoE layers, the experts of its words.

    A line that is translated in several parts has no experts here.
    """
    reading = translator.read([line])
    found = translator.find(reading)
    (translation,) = translator.write(reading, found)
    has_experts = translator.model.moe_layers() and len(found.hypotheses) == 1
    layers = experts_of(translator, reading, found) if has_experts else []
    return {"translation": translation.text, "layers": layers}


def experts_of(translator: Translator, reading: Reading, found: Found) -> list[Record]:
    """The experts of a line of one part, by MoE layer."""
    ((place, hypotheses),) = found.hypotheses.items()
    source, target = reading.sources[place], hypotheses[0].tokens
    scorer = Scorer(
        translator.model,
        np.concatenate([reading.symbols, source]).astype(np.int64),
        np.array(target, dtype=np.int64),
        reading.options.experts_per_token,
    )
    pieces = {side: translator.subwords.pieces([*ids, EOS]) for side, ids in (("encoder", source), ("decoder", target))}
    return [layer_record(layer, pieces[LayerName.of(layer.layer).side]) for layer in explain_pair(scorer)]


def layer_record(layer: LayerExplanation, pieces: Sequence[str]) -> Record:
    """The strongest expert of each word, with its share of the gates, and the experts that are needed most.

    `pieces` are those of the last positions of the layer, with the end, which is no word here. An encoder reads symbols
    before them. An expert is None if none was chosen.
    """
    positions = iter(layer.positions[len(layer.positions) - len(pieces) :])
    words, experts, shares = list[str](), list[int | None](), list[float]()
    for word, count in split_words(pieces)[:-1]:
        gates: dict[int, float] = {}
        for slot in chain.from_iterable(islice(positions, count)):
            gates[slot.expert] = gates.get(slot.expert, 0.0) + slot.gate
        strongest = max(gates, key=gates.__getitem__, default=None)
        words.append(word)
        experts.append(strongest)
        shares.append(0.0 if strongest is None else round(gates[strongest] / (sum(gates.values()) or 1.0), 2))
    needed = [
        {"expert": each.expert, "subwords": each.positions, "nats": round(each.contribution, 2)}
        for each in layer.experts[:_MOST_NEEDED]
    ]
    return {
        "layer": layer.layer,
        "num_experts": layer.num_experts,
        "words": words,
        "experts": experts,
        "shares": shares,
        "needed": needed,
    }


def system_record(run: RunDirectory, text: EvaluationSet, places: Sequence[int]) -> tuple[Record, list[Record]]:
    """What a run is, and its translations of these lines with their chrF2."""
    config = run.config()
    translator = Translator.load(run, config)
    found = [translated(translator, text.sources[place]) for place in places]
    references = [text.references[0][place] for place in places]
    scores = SystemScores([[each["translation"] for each in found]], [references], "13a")
    (chrf,) = scores.sentence_scores("chrF2")
    decoding = config.to_dict()["decoding"]
    system = {
        "run": run.path.resolve().name,
        "steps": translator.steps,
        "num_experts": config.model.moe.num_experts,
        "decoding": {name: decoding[name] for name in _SEARCH},
    }
    signature = scores.signatures()["chrF2"]
    return {**system, "chrF2": signature}, [
        {"run": system["run"], "chrF2": round(score, 1), **each} for score, each in zip(chrf, found, strict=True)
    ]


def begun(text: EvaluationSet, lines: Sequence[int]) -> Record:
    """A record without any run; `lines` is empty for those that the rule chooses."""
    places = [line - 1 for line in lines] or chosen_places(text.sources)
    if wrong := [place + 1 for place in places if not 0 <= place < text.size]:
        raise UserError(f"--lines has {wrong[0]}; the set has lines 1 to {text.size:,}")
    rule = f"Of the lines with {FEWEST_WORDS} to {MOST_WORDS} words, these are the middle ones of each fifth."
    samples = [
        {"line": place + 1, "source": text.sources[place], "reference": text.references[0][place], "systems": []}
        for place in places
    ]
    names = [Path(file.path).name for file in text.files]
    return {
        "source": names[0],
        "reference": names[1],
        "sha256": [file.sha256 for file in text.files],
        "rule": "The lines were chosen by hand." if lines else rule,
        "systems": [],
        "samples": samples,
    }


def continued(output: Path, record: Record) -> Record:
    """What is in a file already, or this record without any run. UserError if the file has other lines."""
    if not output.exists():
        return record
    try:
        before: Record = read_json(output, {"sha256": [str], "systems": [{}], "samples": [{"line": int}]})
    except (OSError, ValueError) as error:
        raise UserError(f"{output} is no file of samples ({error}): write to another file") from error
    lines, others = ([sample["line"] for sample in each["samples"]] for each in (record, before))
    if (before["sha256"], others) != (record["sha256"], lines):
        raise UserError(f"{output} has samples of another text or other lines: write to another file")
    return before


def add(record: Record, system: Record, found: Sequence[Record]) -> None:
    """Add a run and its translations to a record; those of a run of the same name are replaced."""
    for holder, new in ((record, system), *zip(record["samples"], found, strict=True)):
        others = [each for each in holder["systems"] if each["run"] != new["run"]]
        holder["systems"] = [*others, new]


def as_json(record: Record) -> str:
    """A record as JSON: each translation is on one line."""
    parts = []
    for sample in record["samples"]:
        systems = ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in sample["systems"])
        head = json.dumps({key: value for key, value in sample.items() if key != "systems"}, ensure_ascii=False)
        parts.append(f' {head[:-1]}, "systems": [\n  {systems}\n ]}}')
    head = json.dumps({key: value for key, value in record.items() if key != "samples"}, ensure_ascii=False, indent=1)
    return f'{head[:-2]},\n "samples": [\n' + ",\n".join(parts) + "\n ]\n}\n"


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--source", required=True, metavar="F", help="sentences; .gz is unpacked")
    parser.add_argument("--reference", required=True, metavar="F", help="their translations, line by line")
    parser.add_argument("--lines", nargs="+", type=int, default=[], metavar="N", help="these lines, from 1 on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    output: Path = options.output
    try:
        text = evaluation_set(options.source, [options.reference], "test", RunDirectory.existing(options.runs[0]))
        record = continued(output, begun(text, options.lines))
        places = [sample["line"] - 1 for sample in record["samples"]]
        for name in options.runs:
            system, found = system_record(RunDirectory.existing(name), text, places)
            add(record, system, found)
            print(f"{system['run']}: mean chrF2 {np.mean([each['chrF2'] for each in found]):.1f}", flush=True)
            # After each run, so that nothing is lost if a later one fails.
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, as_json(record).encode())
    except (UserError, OSError) as error:
        print(f"samples: {error}", file=sys.stderr)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
