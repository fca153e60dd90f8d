"""Print as JSON how the routing of a run settles: python scripts/results/routing.py RUN

The dev text goes through every checkpoint that the run kept. For each MoE layer and checkpoint, the figure `next` is
the share of a token's experts that the next checkpoint chooses for it too, and `last` the share that the last one
chooses. Both are means over the tokens. `chance` is the share if experts were drawn at random: k / E. Train with
training.keep_checkpoints=1000, so that all checkpoints are kept.
"""

import argparse
import json
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nmt.checkpoint import list_checkpoints
from nmt.config import LayerName
from nmt.data.held_out import encode_pairs, eval_batches
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, UserError
from nmt.run import RunDirectory

_BATCH_TOKENS = 16384


def kept_share(before_TK: Tensor, after_TK: Tensor) -> float:
    """The share of each token's experts that it has both times, as a mean over the tokens; slots may differ."""
    same_TKK = before_TK[:, :, None] == after_TK[:, None]
    return float(same_TKK.any(2).double().mean())


@torch.inference_mode()
def choices(run: RunDirectory, step: int, pairs: int) -> dict[str, Tensor]:
    """The experts of each token of the dev text (T, K), by MoE layer, at a step."""
    config = run.config()
    translator = Translator.load(run, replace(config, decoding=replace(config.decoding, checkpoint=str(step))))
    sources, targets, _ = run.text("dev")
    directions = run.directions("dev")
    read = translator.pairs(sources[:pairs], targets[:pairs], directions=directions[:pairs])
    encoded = encode_pairs(translator.subwords, read.sources, read.targets, prefixes=read.symbols)[:2]
    found: dict[str, list[Tensor]] = {}
    for batch in eval_batches(*encoded, _BATCH_TOKENS):
        for layer, gate in translator.model.gates(batch.to(translator.device)).items():
            rows = batch.source if LayerName.of(layer).side == "encoder" else batch.target
            expert_TK = gate.expert_TK if rows.real_N is None else gate.expert_TK[rows.real_N.to(translator.device)]
            found.setdefault(layer, []).append(expert_TK.cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def routing(run: RunDirectory, pairs: int) -> dict[str, Any]:
    """The figures above."""
    steps = [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)]
    if not steps:
        raise CheckpointError(f"{run.path} has no checkpoint")
    chosen = {step: choices(run, step, pairs) for step in sorted(steps)}
    moe, last = run.config().model.moe, max(steps)
    found: dict[str, Any] = {"run": run.path.name, "pairs": pairs, "layers": {}}
    for layer, final_TK in chosen[last].items():
        after = dict(pairwise(chosen))
        found["layers"][layer] = {
            "chance": moe.experts_per_token / moe.experts_at(layer),
            "next": {step: round(kept_share(chosen[step][layer], chosen[after[step]][layer]), 4) for step in after},
            "last": {step: round(kept_share(chosen[step][layer], final_TK), 4) for step in after},
        }
    return found


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run with MoE layers")
    parser.add_argument("--pairs", type=int, default=500, help="pairs of the dev text (default 500)")
    options = parser.parse_args()
    try:
        if options.pairs < 1:
            raise UserError(f"--pairs {options.pairs}: at least one")
        print(json.dumps(routing(RunDirectory.existing(options.run), options.pairs), indent=1))
    except UserError as error:
        print(f"routing: {error}", file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":
    main()
