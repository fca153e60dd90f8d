"""nmt export: write one folder with everything that is needed to use a model."""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from nmt.checkpoint import BF16_FORMAT, EXPORT_FORMAT, EXPORTED_PARAMETERS, MODEL_CARD, seal
from nmt.commands import Parser, say, show
from nmt.commands.direction import directions_of
from nmt.config import Config, CorpusConfig, DecodingConfig, FilesConfig, RunConfig
from nmt.decoding.loading import Loaded, load_model
from nmt.errors import StorageError, UserError
from nmt.files import folder_atomically, read_json
from nmt.lock import Held, locked
from nmt.model.names import is_expert
from nmt.model.working import WorkingWeights
from nmt.pages.card import CardFacts, SetScores, model_card, own_sets
from nmt.parameters import write_parameters
from nmt.run import RunDirectory
from nmt.wording import steps_of

# The parts of report/SET.json that a model card shows.
_REPORT = {
    "own": bool,
    "sentences": int,
    "steps": [int],
    "scores": {str: {"score": float, "signature": str}},
    "perplexity": float,
    "decoding": {"beam_size": int, "alpha": float, "beta": float, "experts_per_token": int},
}


def parser() -> Parser:
    """Options of `nmt export`."""
    parser = Parser(
        "export",
        "Write a self-contained folder: the parameters of one checkpoint in safetensors (the best one, or that of\n"
        "decoding.checkpoint), configuration, vocabulary, counts of the training text, hashes of all these, and a\n"
        "model card, README.md, with the scores that nmt evaluate found before on the run's own sets. No hash covers\n"
        "the card: you may add a licence or notes to it. The folder has no text and no optimiser state. All commands\n"
        "except training accept it as a run.",
        "  nmt export demo exports/demo\n"
        "  nmt export runs/demo /models/demo decoding.checkpoint=average\n"
        "  nmt translate exports/demo input.en -o output.de",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder to write: new, or empty")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="write in bf16 what a translation with decoding.precision=bf16 has in bf16: half the size, and experts\n"
        "are read only when a token needs them",
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Write the whole of `options.folder`, or nothing if that fails."""
    if run.exported:
        raise UserError(f"{run.path} is already an exported model: copy it")
    final = _new_folder(options.folder)
    loaded = load_model(run, config)
    facts = CardFacts(
        _portable(config, run),
        run.corpus_info(),
        loaded.subwords.fingerprint,
        {checkpoint.step: checkpoint.score for checkpoint in loaded.checkpoints},
        _reports(run, config),
        parameter_bytes=0,
        bf16=options.bf16,
    )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f".{final.name}.lock")), folder_atomically(final) as folder:
            size = _write(folder, run, loaded, facts, BF16_FORMAT if options.bf16 else EXPORT_FORMAT)
    except Held as holder:
        raise UserError(f"{options.folder} is being written by {holder}: wait for it, or name another folder") from None
    except OSError as error:
        raise StorageError(f"cannot write {options.folder}: {error.strerror or error}") from error
    say(f"{steps_of(loaded.steps)} of {run.path}, {size / 1e6:,.1f} MB; README.md is the model card")
    if not own_sets(facts):
        say(
            "the model card has no BLEU or chrF: to add them, run nmt evaluate before, on the run's own text (without "
            "--source) and with the same decoding.checkpoint"
        )
    show(options.folder)


def _new_folder(name: str) -> Path:
    """Return the absolute path of DIR. UserError if it exists and is not empty, or is inside a run."""
    path = Path(name).resolve()
    for folder in (path, *path.parents):
        found = RunDirectory(folder)
        if found.config_path.exists() and found.subwords_path.exists():
            where = "is a run or an exported model" if folder == path else f"is in {folder}, a run or exported model"
            raise UserError(f"{name} {where}: name a folder elsewhere")
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} is a file: name a new folder")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{name} is not empty: name a new folder")
    return path


def _portable(config: Config, run: RunDirectory) -> Config:
    """Return the configuration to export, for one set of parameters and without folders of this machine."""
    corpus = config.corpus
    source = Path(corpus.source).expanduser()
    # A data set of the hub, OWNER/NAME, is not a local folder.
    local = source.is_absolute() or corpus.source.startswith(".") or source.is_dir()
    return replace(
        config,
        run=RunConfig(config.run.name or run.path.resolve().name),
        corpus=replace(
            corpus,
            directory=CorpusConfig.directory,
            root=CorpusConfig.root,
            source=source.resolve().name if local else corpus.source,
            train=_names_alone(corpus.train),
            dev=_names_alone(corpus.dev),
            test=_names_alone(corpus.test),
            mixture={Path(name).name: weight for name, weight in corpus.mixture.items()},
            subwords=replace(corpus.subwords, vocabulary=Path(corpus.subwords.vocabulary).name),
        ),
        training=replace(config.training, watch=[Path(name).name for name in config.training.watch]),
        decoding=replace(config.decoding, checkpoint=DecodingConfig.checkpoint),
    )


def _names_alone(files: FilesConfig) -> FilesConfig:
    source, target, pairs = ([Path(name).name for name in names] for names in (files.source, files.target, files.pairs))
    texts = {language: [Path(name).name for name in names] for language, names in files.texts.items()}
    return replace(files, source=source, target=target, pairs=pairs, texts=texts)


def _reports(run: RunDirectory, config: Config) -> list[SetScores]:
    """Return what `nmt evaluate` found on the run's own sets. Reports on other text are never part of a card.

    A run of several directions has a report for each, and one on a zero-shot direction is no part of a card either.
    """
    found = []
    directions = directions_of(run, config)
    parts = [f"-{direction}" for direction in directions.trained] if directions.are_several else [""]
    for name in (f"{split}{part}" for split in ("dev", "test") for part in parts):
        path = run.report / f"{name}.json"
        if not path.exists():
            continue
        try:
            report = read_json(path, _REPORT)
            if not report["own"]:
                raise ValueError("it is about other text than the run's own")
        except (OSError, ValueError) as error:
            say(f"{path} is left out of the card ({error}): run nmt evaluate again")
            continue
        figures = report["steps"], report["scores"], report["perplexity"], report["decoding"]
        found.append(SetScores(name, report["sentences"], *figures))
    return found


def _write(folder: Path, run: RunDirectory, loaded: Loaded, facts: CardFacts, number: int) -> int:
    """Write all files in format `number`, the manifest last, and return the size of the parameters in bytes."""
    parameters = folder / EXPORTED_PARAMETERS
    dtype = torch.bfloat16 if number == BF16_FORMAT else torch.float32
    model = WorkingWeights(loaded.model, torch.device("cpu"), dtype).model
    write_parameters(model, parameters)
    size = parameters.stat().st_size
    copy = RunDirectory(folder)
    text = yaml.safe_dump(facts.config.to_dict(), sort_keys=False, allow_unicode=True)
    copy.config_path.write_text(text, encoding="utf-8")
    shutil.copyfile(run.subwords_path, copy.subwords_path)
    copy.corpus_path.write_text(json.dumps(facts.corpus, indent=2), encoding="utf-8")
    # safetensors writes files that other users may not read.
    shutil.copymode(copy.config_path, parameters)
    (folder / MODEL_CARD).write_text(model_card(replace(facts, parameter_bytes=size)), encoding="utf-8")
    scores = list(facts.validations.values())
    manifest = {
        "format": number,
        "step": max(loaded.steps),
        "steps": loaded.steps,
        # Lower is better: perplexity, or negative BLEU (training.best_by). A mean of several steps has no score.
        "score": scores[0] if len(scores) == 1 else None,
        "best_by": facts.config.training.best_by,
        "vocabulary": facts.vocabulary,
        "scores": [asdict(each) for each in own_sets(facts)],
    }
    seal(folder, manifest, {name: len(each) for name, each in model.named_parameters() if is_expert(name)})
    return size
