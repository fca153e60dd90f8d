"""Load the model and the vocabulary of a run or an exported model."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nmt.checkpoint import Checkpoint
from nmt.config import Config, DecodingConfig
from nmt.data.subwords import RESERVED, Subwords
from nmt.data.symbols import Symbols
from nmt.device import search_dtype
from nmt.errors import CheckpointError
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import WorkingWeights, with_packed_weights
from nmt.parameters import read_model
from nmt.run import RunDirectory


def longest_source(corpus: Mapping[str, Any], config: Config) -> int:
    """Return the subwords of the longest source line in the training text, as recorded in `corpus`; 0: unknown.

    If an older version wrote `corpus` without it, this is the limit of the filter for long lines. CheckpointError if
    the record is not a number of subwords.
    """
    longest = corpus.get("longest_source_pieces", config.corpus.filters.max_pieces)
    if not isinstance(longest, int) or longest < 0:
        raise CheckpointError(f"corpus.json is damaged: longest_source_pieces={longest!r} is not a number of subwords")
    return longest


def known_symbols(corpus: Mapping[str, Any]) -> frozenset[str]:
    """Return the kinds of reserved symbols that a model has learned, as recorded in `corpus`: "slot", "term".

    Models of older versions know none. CheckpointError if the record is not a list of names.
    """
    kinds = corpus.get("symbols", [])
    if not isinstance(kinds, list) or not all(kind in [*RESERVED] for kind in kinds):
        raise CheckpointError(f"corpus.json is damaged: symbols={kinds!r} is not a list of kinds of symbols")
    return frozenset(kinds)


class Loaded(NamedTuple):
    """A loaded model, on the CPU and in evaluation mode."""

    model: Seq2Seq
    subwords: Subwords
    checkpoints: list[Checkpoint]
    """The checkpoints whose parameters, or mean of parameters, the model has."""

    @property
    def steps(self) -> list[int]:
        """Steps of all these checkpoints."""
        return [step for checkpoint in self.checkpoints for step in checkpoint.steps]


def load_model(run: RunDirectory, config: Config, in_place: Collection[str] = ()) -> Loaded:
    """Return the model of a run, with the checkpoint of `config.decoding`, or an exported model.

    `in_place` is as for `read_model`. CheckpointError if the run, its checkpoint or its vocabulary is missing or
    damaged, or if they do not fit together.
    """
    subwords = load_vocabulary(run)
    chosen = run.chosen(config.decoding)
    while True:
        try:
            model = read_model(chosen, config.model, subwords.size, subwords.fingerprint, in_place)
            return Loaded(model, subwords, chosen)
        except CheckpointError:
            # If the run is being trained, newer checkpoints may have replaced the selected ones: select again.
            listed, chosen = chosen, run.chosen(config.decoding)
            if chosen == listed:
                raise


def others_of(decoding: DecodingConfig) -> list[tuple[RunDirectory, Config]]:
    """Return the other runs of an ensemble, with the configuration to load each: the checkpoint is that of `decoding`.

    CheckpointError if one of them is not a run.
    """
    found = []
    for name in decoding.ensemble:
        run = RunDirectory.existing(name)
        config = run.config()
        chosen = replace(
            config.decoding, checkpoint=decoding.checkpoint, average_checkpoints=decoding.average_checkpoints
        )
        found.append((run, replace(config, decoding=chosen)))
    return found


def load_others(subwords: Subwords, decoding: DecodingConfig, in_place: Collection[str] = ()) -> list[Loaded]:
    """Return the other models of an ensemble, as `load_model` does.

    CheckpointError also if one has another vocabulary than `subwords`.
    """
    found = []
    for run, config in others_of(decoding):
        loaded = load_model(run, config, in_place)
        if loaded.subwords.fingerprint != subwords.fingerprint:
            raise CheckpointError(
                f"decoding.ensemble: {run.path} has another vocabulary than the model that it should join; name runs "
                "that were trained on the same prepared corpus"
            )
        found.append(loaded)
    return found


def check_symbols(symbols: Symbols, decoding: DecodingConfig) -> None:
    """Raise CheckpointError if the symbols of directions and tags mean something else in a model of an ensemble."""
    for run, _ in others_of(decoding):
        theirs = Symbols.of(run.corpus_info(), str(run.corpus_path))
        if not symbols.agrees_with(theirs):
            raise CheckpointError(
                f"decoding.ensemble: {run.path} has other target languages or tags than the model that it should join "
                f"({_listed(theirs)} instead of {_listed(symbols)}): name runs whose symbols mean the same"
            )


def check_punctuation(punctuation: str, decoding: DecodingConfig) -> None:
    """Raise CheckpointError if a model of an ensemble has learned other punctuation, as all read the same text."""
    for run, config in others_of(decoding):
        if config.corpus.punctuation != punctuation:
            raise CheckpointError(
                f"decoding.ensemble: {run.path} has corpus.punctuation={config.corpus.punctuation}, and the model that "
                f"it should join has corpus.punctuation={punctuation}: name runs with the same"
            )


def _listed(symbols: Symbols) -> str:
    return ", ".join((*symbols.languages, *symbols.tags)) or "none"


def prepared(model: Seq2Seq, device: torch.device, decoding: DecodingConfig) -> Seq2Seq:
    """Return a model in the form that searches use. ValueError if `decoding` is not possible with it."""
    model.check_experts_per_token(decoding.experts_per_token)
    dtype = search_dtype(device, decoding)
    prepared = WorkingWeights(model, device, dtype).model
    quantized = decoding.quantize == "int8"
    if device.type == "cpu" and (quantized or dtype == torch.bfloat16):
        return with_packed_weights(prepared, torch.int8 if quantized else dtype)
    return prepared


def load_vocabulary(run: RunDirectory) -> Subwords:
    """Return the vocabulary of a run. CheckpointError if it is missing or damaged."""
    try:
        return Subwords.load(run.subwords_path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
