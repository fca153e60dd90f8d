"""Start a run with the parameters of another one (`run.start_from`).

A parameter is taken if the other network has one of the same name and shape. All others keep the initial values that
they have in any new run. Only parameters are taken: moments, learning rate, schedule and place in the data start anew.

If the vocabularies differ, the embeddings, softmax weights and biases of subwords are matched piece by piece. A piece
that both have keeps its row. Special symbols, reserved symbols and bytes match by kind and number. But if both runs
have symbols of languages, these match by language, whatever their numbers; tags likewise. A new piece starts with the
mean of the rows of the pieces into which the old vocabulary cuts its text.

Letters: V subwords of the new vocabulary, U of the old one, D width.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.checkpoint import Checkpoint, exported_checkpoint, list_checkpoints
from nmt.config import Config, DecodingConfig
from nmt.data.subwords import Subwords
from nmt.data.symbols import Symbols
from nmt.decoding.loading import load_vocabulary
from nmt.errors import CheckpointError, UserError
from nmt.model.names import EMBEDDING, PIECE_ROWS, TIED, is_expert, summary
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.parameters import Stored, check_finite, check_vocabulary, read_stored, stored
from nmt.run import RunDirectory, flatten
from nmt.wording import brief, steps_of


@dataclass(frozen=True)
class Origin:
    """What a new run starts from: a checkpoint of another run, or an exported model."""

    path: Path
    """Folder of the run."""
    steps: list[int]
    """Steps of the run whose parameters, or the mean of them, these are."""
    fingerprint: str
    """That of the checkpoint (`Checkpoint.fingerprint`)."""

    @classmethod
    def find(cls, config: Config, run: RunDirectory) -> "Origin":
        """Return the origin that `run.start_from` names, for the new run `run`.

        CheckpointError if there is no such run, or if it has no checkpoint. UserError if it is `run` itself.
        """
        name = config.run.start_from
        itself = UserError(f"run.start_from={name} is the run itself: name another run, or leave run.start_from out")
        try:
            source = RunDirectory.existing(name)
        except CheckpointError as error:
            if run.path.resolve() in (Path(name).resolve(), (Path("runs") / name).resolve()):
                raise itself from error
            raise CheckpointError(f"run.start_from={name}: {error}") from error
        if source.path.resolve() == run.path.resolve():
            raise itself
        [checkpoint] = source.chosen(DecodingConfig())
        return cls(source.path, checkpoint.steps, checkpoint.fingerprint)

    def record(self) -> dict[str, Any]:
        """Return what corpus.json of the new run keeps about this, under `nmt.run.STARTED_FROM`."""
        return {"name": self.path.resolve().name, "steps": self.steps, "fingerprint": self.fingerprint}

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint. CheckpointError if it is gone."""
        run = RunDirectory(self.path)
        there = [exported_checkpoint(run.path)] if run.exported else list_checkpoints(run.checkpoints)
        found = [each for each in there if each.fingerprint == self.fingerprint]
        if not found:
            raise CheckpointError(
                f"{steps_of(self.steps)} of run.start_from={self.path} is gone: run the same command again to start "
                "from another"
            )
        return found[0]


class PieceRows(NamedTuple):
    """How the rows of a new vocabulary are made from those of an old one."""

    old_size: int
    old_ids: Tensor  # int64: for each new piece in turn, the old ones whose mean it starts with
    ends_V: Tensor  # int64: end of each new piece's old ones; a piece without any keeps its initial value
    told: str

    @classmethod
    def match(cls, old: Subwords, new: Subwords, old_symbols: Symbols, new_symbols: Symbols) -> "PieceRows":
        """Match the pieces of two vocabularies, given the meanings of their reserved symbols."""
        # A piece of text may be written like a symbol.
        named = enumerate(_named(old, old_symbols, new_symbols))
        place = {(piece, text is None): each for each, (piece, text) in named}
        sources: list[list[int]] = []
        shared = 0
        for piece, text in _named(new, new_symbols, old_symbols):
            same = place.get((piece, text is None))
            shared += same is not None
            sources.append([same] if same is not None else [] if text is None else old.encode_within(text))
        without = sum(not each for each in sources)
        counts = {
            "in both": shared,
            "new from the mean of their parts": len(sources) - shared - without,
            "new and as in any new run": without,
            "of the old one left behind": old.size - shared,
        }
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        ends_V = torch.tensor([len(each) for each in sources]).cumsum(0)
        return cls(old.size, torch.tensor([each for found in sources for each in found]), ends_V, f"subwords: {told}")

    def fill(self, parameter: Tensor, old: Tensor) -> int:
        """Set the rows of `parameter`, (V, D) or (V), from those of `old`. Return how many of its numbers were set."""
        begins_V = self.ends_V - self.ends_V.diff(prepend=self.ends_V.new_zeros(1))
        mean_VD = F.embedding_bag(self.old_ids, old.reshape(len(old), -1), begins_V, mode="mean")
        known_V = begins_V < self.ends_V
        parameter[known_V] = mean_VD.view(parameter.shape)[known_V].to(parameter.dtype)
        return int(known_V.sum()) * parameter[0].numel()


def _named(subwords: Subwords, symbols: Symbols, others: Symbols) -> Iterator[tuple[str, str | None]]:
    """Return the name and the text of each piece. A symbol is named by its meaning if both tables have some."""
    names = subwords.pieces(range(subwords.size))
    for kind, meanings, known in (
        ("language", symbols.languages, others.languages),
        ("tag", symbols.tags, others.tags),
    ):
        for place, meaning in zip(subwords.reserved_ids(kind), meanings if known else (), strict=False):
            names[place] = f"<{kind}={meaning}>"
    return zip(names, subwords.texts(), strict=True)


@torch.no_grad()
def start_from(
    model: Seq2Seq, origin: Origin, config: Config, subwords: Subwords, symbols: Symbols, world: World
) -> list[str]:
    """Give a new model on the CPU, with its share of the experts, the parameters of `origin` that fit it.

    `subwords` is the model's vocabulary, in which reserved symbols have the meanings `symbols`. Return lines that
    report what was taken and what was not. CheckpointError if the origin is damaged; UserError if nothing of it fits.
    """
    source, checkpoint = RunDirectory(origin.path), origin.checkpoint()
    problem = world.on_main(lambda: checkpoint.verify("model"))
    if problem:
        raise CheckpointError(f"{checkpoint.path} is damaged ({problem}): choose another run.start_from")
    old = load_vocabulary(source)
    check_vocabulary(checkpoint, old.fingerprint)
    meant = Symbols.of(source.corpus_info(), str(source.corpus_path))
    same = old.fingerprint == subwords.fingerprint and meant.fits(symbols)
    pieces = None if same else PieceRows.match(old, subwords, meant, symbols)
    found = stored(checkpoint.parameters)
    there = dict.fromkeys(TIED, found[EMBEDDING]) | found if EMBEDDING in found else found
    whole: dict[str, int] = {}
    taken: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        by_piece = pieces if name in PIECE_ROWS else None
        shape, rows = list(parameter.shape), None
        if is_expert(name):
            rows = range(model.share.rank * shape[0], (model.share.rank + 1) * shape[0])
            shape[0] *= model.share.size
        whole[name] = math.prod(shape)
        if by_piece:
            shape[0] = by_piece.old_size
        if name not in there or list(there[name].shape) != shape:
            continue
        value = read_stored(there[name], name if name in found else EMBEDDING, rows).float()
        check_finite(checkpoint, name, value)
        if by_piece:
            taken[name] = by_piece.fill(parameter, value)
        else:
            parameter.copy_(value)
            taken[name] = whole[name]
    if not taken:
        raise UserError(
            f"run.start_from={config.run.start_from}: no parameter of this network has the name and shape of one "
            "there; give the settings model.* of that run, or leave run.start_from out"
        )
    here, there_before = (flatten(asdict(each)) for each in (config.model, source.config().model))
    differing = [key for key, value in here.items() if value != there_before.get(key)]
    return _report(origin, whole, taken, found, pieces, differing)


def _report(
    origin: Origin,
    whole: Mapping[str, int],
    taken: Mapping[str, int],
    found: Mapping[str, Stored],
    pieces: PieceRows | None,
    differing: list[str],
) -> list[str]:
    """Return the lines to print.

    `whole` and `taken` have the numbers in each tensor, and how many of them were set. `differing` are the settings of
    the network that differ: not all of them show in a shape.
    """
    told = (
        f"starting from {origin.path}, {steps_of(origin.steps)}: {len(taken)} of {len(whole)} tensors taken, "
        f"{brief(sum(taken.values()))} of {brief(sum(whole.values()))} parameters"
    )
    missing = [name for name in whole if name not in taken]
    parts = {
        "new": [name for name in missing if name not in found],
        "new, as the shape differs": [name for name in missing if name in found],
        "left behind": found.keys() - whole.keys(),
    }
    told += "".join(f"; {what}: {summary(names)}" for what, names in parts.items() if names)
    told += f"; other model.*: {', '.join(differing)}" if differing else ""
    if pieces is None:
        return [f"{told}; the same subwords"]
    return [told, pieces.told] if any(name in taken for name in PIECE_ROWS) else [told]
