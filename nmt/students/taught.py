"""A prepared corpus whose targets are a teacher's: like the student's own corpus in everything else.

It has the same vocabulary, the same pairs in the same order, and the same dev and test text. So it can be mixed with
the student's own corpus (`corpus.mixture`), or take its place. At word level, the targets have the teacher's most
probable subwords at each position too.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import Config
from nmt.data.prepared import Part, Prepared
from nmt.data.shards import MANIFEST, TEACHER_BEST, ShardWriter, ids_dtype, teacher_dtype
from nmt.data.subwords import Subwords
from nmt.decoding.loading import load_vocabulary, others_of
from nmt.errors import StorageError, UserError
from nmt.files import folder_atomically, remove
from nmt.lock import locked
from nmt.run import RunDirectory
from nmt.students.parts import Log, Make, Parts
from nmt.students.teacher import WHY_KEPT, Taught, Teacher
from nmt.text.punctuation import normaliser
from nmt.wording import scaled

_VERSION = 1
"""Of what `Teacher.teach` makes of a pair."""
_NOT_OF_TEXT = ("device", "batch_tokens")
"""Settings `decoding.*` that do not change translations."""
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def lesson_of(
    prepared: Prepared, run: RunDirectory, config: Config, choose: str, word_level: bool = False
) -> dict[str, Any]:
    """Return what decides the targets: text, vocabulary, checkpoints, settings of the search, and the choice.

    At word level, this has the number of subwords per position, too. UserError then if the teacher has another
    vocabulary, and CheckpointError if it has none.
    """
    if word_level and load_vocabulary(run).fingerprint != prepared.subwords().fingerprint:
        raise UserError(
            f"--word-level needs a teacher with the student's vocabulary, and {run.path} has another than "
            f"{prepared.path}: give corpus.subwords.vocabulary={run.path}, or leave --word-level out"
        )
    models = [(run, config), *others_of(config.decoding)]
    decoding = {key: value for key, value in asdict(config.decoding).items() if key not in _NOT_OF_TEXT}
    return {
        "version": _VERSION,
        "corpus": prepared.fingerprint,
        "files": {name: record["sha256"] for name, record in sorted(prepared.manifest["files"].items())},
        "checkpoints": [each.fingerprint for model, own in models for each in model.chosen(own.decoding)],
        "decoding": decoding,
        "choose": choose,
    } | ({"word_level": TEACHER_BEST} if word_level else {})


def taught_path(prepared: Prepared, lesson: dict[str, Any]) -> Path:
    """Return the folder of the taught corpus, beside the prepared one."""
    fingerprint = hashlib.sha256(json.dumps(lesson, sort_keys=True).encode()).hexdigest()[:8]
    return prepared.path.with_name(f"{prepared.manifest['corpus']['name']}-taught-{fingerprint}")


def taught_corpus(prepared: Prepared, lesson: dict[str, Any], teacher: Callable[[], Make], log: Log) -> Prepared:
    """Return the taught corpus. What is missing of it is made with `teacher()`, which loads it.

    Several processes may call this at the same time: they share the parts, and one of them writes the folder. Errors
    are those of `Parts` and of the teacher.
    """
    path = taught_path(prepared, lesson)
    shards = only_part(prepared).shards
    parts = Parts(path, len(shards))
    if not path.exists():
        if parts.num_done() < parts.count:
            if _is_word_level(lesson):
                positions = int(shards.target_lengths.sum()) + len(shards)
                size = positions * teacher_dtype(ids_dtype(prepared.subwords().size)).itemsize
                log(
                    f"the {TEACHER_BEST} most probable subwords at each target position need about "
                    f"{scaled(size, _BYTES)} ({scaled(size / len(shards), _BYTES)} per pair)"
                )
            parts.fill(teacher(), log)
        try:
            with locked(path.with_name(f".{path.name}.lock"), lambda _other: None):
                if not path.exists():
                    _write(prepared, lesson, parts, path, log)
                    remove(parts.folder)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return Prepared.open(path)


def only_part(prepared: Prepared) -> Part:
    """Return the only part of a corpus. UserError if it has several."""
    parts = prepared.parts()
    if len(parts) > 1:
        raise UserError(
            f"{prepared.path} has {len(parts)} directions or tags, and nmt distill takes one: choose a corpus of one"
        )
    return parts[0]


def lessons(teacher: Teacher, prepared: Prepared, word_level: bool = False) -> Make:
    """Return the function that translates pairs of a corpus, and at word level adds the teacher's rows."""
    subwords, part = prepared.subwords(), only_part(prepared)

    def make(pairs: range, progress: Callable[[float], None]) -> Taught:
        sources, targets = ([side(pair) for pair in pairs] for side in (part.shards.source, part.shards.target))
        taught = teacher.teach(sources, targets, subwords, part.direction, part.tag, progress)
        if not word_level:
            return taught
        targets, _ = _targets_of(taught, targets, subwords, prepared)
        return taught._replace(teacher_N=teacher.probabilities(sources, targets, subwords, part.direction, part.tag))

    return make


def _write(prepared: Prepared, lesson: dict[str, Any], parts: Parts, path: Path, log: Log) -> None:
    """Write the folder from the finished parts."""
    subwords, shards = prepared.subwords(), only_part(prepared).shards
    kept = Counter[str]()
    with folder_atomically(path) as folder:
        for name in prepared.manifest["files"]:
            shutil.copyfile(prepared.path / name, folder / name)
        with ShardWriter(folder, subwords.size, taught=_is_word_level(lesson)) as writer:
            for number in range(parts.count):
                part, pairs = parts.read(number), parts.pairs(number)
                references = [shards.target(pair) for pair in pairs]
                targets, filtered = _targets_of(part, references, subwords, prepared)
                kept.update(part.kept)
                kept.update(filtered)
                rows_N = None
                if _is_word_level(lesson):
                    count = sum(map(len, targets)) + len(targets)
                    rows_N = parts.read_rows(number, teacher_dtype(writer.dtype), count)
                writer.append([shards.source(pair) for pair in pairs], targets, rows_N)
        taught = lesson | {"pairs": parts.num_pairs, "kept": dict(kept)}
        manifest = prepared.manifest | {
            "sources": [],
            "target_pieces": writer.num_pieces["target"],
            "shards": {"train": writer.record()},
            "taught": taught,
        }
        if prepared.manifest.get("parts"):
            manifest["parts"] = [prepared.manifest["parts"][0] | {"shards": "train", "swapped": False}]
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")
    log(f"{path}: {parts.num_pairs - kept.total():,} of {parts.num_pairs:,} pairs have a target of the teacher")
    for why, count in sorted(kept.items(), key=lambda each: -each[1]):
        log(f"{count:,} keep their reference: those {WHY_KEPT[why]}")


def _is_word_level(lesson: dict[str, Any]) -> bool:
    return "word_level" in lesson


def _targets_of(
    taught: Taught, references: Sequence[np.ndarray], subwords: Subwords, prepared: Prepared
) -> tuple[list[np.ndarray], Counter[str]]:
    """Return (the targets of pairs as subword ids, how many more keep their reference and why)."""
    targets, filtered = [*references], Counter[str]()
    corpus = prepared.manifest["corpus"]
    most = corpus["filters"]["max_pieces"]
    # The teacher may have learned other punctuation than the student's corpus has.
    normalise = normaliser(corpus.get("punctuation", "keep"), only_part(prepared).direction.target)
    new = [(pair, text) for pair, text in enumerate(taught.texts) if text is not None]
    encoded = subwords.encode_batch([normalise(text) for _, text in new])
    for (pair, _), ids in zip(new, encoded, strict=True):
        if most and len(ids) > most:
            filtered["filtered"] += 1
        else:
            targets[pair] = ids
    return targets, filtered
