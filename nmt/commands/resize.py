"""nmt experts RUN --grow | --prune | --merge ... -o NEWRUN: write a run with more or fewer experts."""

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nmt.commands import say, show
from nmt.commands.dev_pairs import DevPairs
from nmt.config import Config, DecodingConfig, RunConfig
from nmt.config.reading import written
from nmt.cost.operations import model_cost
from nmt.data.subwords import Subwords
from nmt.decoding.directions import Directions
from nmt.decoding.loading import load_vocabulary, longest_source
from nmt.decoding.translator import Translator
from nmt.device import pick_device, set_float32_products
from nmt.errors import UserError
from nmt.evaluation.perplexity import perplexity
from nmt.experts import shrink
from nmt.experts.grow import grow
from nmt.experts.observe import ExpertUse, Observation, observe, output_similarity
from nmt.experts.shrink import MergePair
from nmt.experts.surgery import NetworkWeights, read_network, write_run
from nmt.model.gate_statistics import shares
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.wording import counted, millions

# Numbers of pairs, spread over the dev set: to observe the experts, to translate before and after, and to compare
# perplexity before and after growth.
_WATCHED, _TRANSLATED, _COMPARED = 2000, 500, 200


def resize(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Write a new run with more or fewer experts, and print the command that trains it further."""
    path = _new_path(options.output, run)
    _check_count(options, config)
    subwords = load_vocabulary(run)
    network, checkpoint = read_network(run, config, subwords.fingerprint, subwords.size)
    bench = _Bench(run, config, subwords)
    if options.grow is not None:
        changed = grow(network, options.grow, config.training.seed + checkpoint.step, options.redraw)
        bench.show_perplexity(network, changed, options.redraw)
    else:
        changed = bench.shrink(options, network)
    decoding, notes = _own_decoding(run)
    new = replace(config, run=RunConfig(path.name, str(path.parent)), model=changed.config, decoding=decoding)
    command = ["nmt", "train", str(path)]
    if checkpoint.step >= config.training.max_steps:
        notes.append(f"{run.path} has reached training.max_steps={config.training.max_steps}: give a larger number")
        command.append(f"training.max_steps={2 * checkpoint.step}")
    write_run(path, run, new, changed, checkpoint, grown=options.grow is not None)
    show(_sizes(network, changed))
    for note in notes:
        say(note)
    if options.grow is not None and changed.config.moe.copies > 1:
        show(_for_another_domain(path, changed.config.moe.copies))
    show(f"{path} resumes from step {checkpoint.step:,} of {run.path} with\n  {shlex.join(command)}")


def _for_another_domain(path: Path, copies: int) -> str:
    """Return how to train the new experts of a grown run on other text."""
    frozen = written([f"experts[::{copies}]"])
    command = [
        "nmt",
        "train",
        "run.name=NAME",
        f"run.start_from={path}",
        "model=inherited",
        f"training.freeze={frozen}",
    ]
    return f"on another corpus, with the earlier experts frozen:\n  {shlex.join(command)} corpus=..."


def _check_count(options: argparse.Namespace, config: Config) -> None:
    """Raise UserError for an invalid or impossible number, before anything is measured."""
    (task,) = (name for name in ("grow", "prune", "merge") if getattr(options, name) is not None)
    count = str(getattr(options, task))
    if (task, count) == ("prune", "idle"):
        return
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"--{task} {count}: give a number of at least 1" + (", or idle" if task == "prune" else ""))
    for layer in config.model.moe_layer_names() if task != "grow" else ():
        shrink.per_group(f"--{task} {count}", config.model.moe, layer, int(count), merging=task == "merge")


def _new_path(output: str, run: RunDirectory) -> Path:
    """Return the path of NEWRUN, which is a path or a plain name beside RUN. UserError if it exists."""
    path = Path(output) if "/" in output else run.path.parent / output
    if Path(output).name in ("", ".."):
        raise UserError(f"-o {output}: name the folder of the new run, or give its name")
    if path.exists():
        raise UserError(f"-o {output}: {path} already exists; choose another name")
    return path


def _own_decoding(run: RunDirectory) -> tuple[DecodingConfig, list[str]]:
    """Return the decoding settings of the new run, and notes on those that differ from the run's config.yaml.

    Changes for this command are left out. The new run does not have the checkpoint of a given step, and may have too
    few experts for `experts_per_token`.
    """
    stored = run.config().decoding
    notes = []
    if stored.checkpoint.isdigit():
        notes.append(f"decoding.checkpoint={stored.checkpoint} becomes best in the new run")
        stored = replace(stored, checkpoint="best")
    if stored.experts_per_token:
        notes.append(
            f"decoding.experts_per_token={stored.experts_per_token} becomes 0 in the new run: as many as in training"
        )
        stored = replace(stored, experts_per_token=0)
    return stored, notes


def _sizes(before: NetworkWeights, after: NetworkWeights) -> str:
    lines = []
    for layer in after.config.moe_layer_names():
        old = before.config.moe.experts_at(layer) if before.config.moe.num_experts else 0
        lines.append(f"{layer} {old} -> {after.config.moe.experts_at(layer)} experts")
    costs = [model_cost(network.config, network.vocab_size) for network in (before, after)]
    parameters = " -> ".join(millions(cost.num_parameters, 2) for cost in costs)
    ops = " -> ".join(millions(cost.ops_per_timestep, 2) for cost in costs)
    return f"{', '.join(lines)}; {parameters} parameters, {ops} ops/timestep"


# -------------------------------------------------------------------------------------- the dev set, before and after


class _Bench:
    """The dev set, and ways to compare networks on it."""

    def __init__(self, run: RunDirectory, config: Config, subwords: Subwords) -> None:
        self.config, self.subwords = config, subwords
        corpus = run.corpus_info()
        self.longest = longest_source(corpus, config)
        self.directions = Directions.of(config, corpus, run.path.name, str(run.corpus_path))
        self.device = pick_device(config.decoding.device, "decoding.device")
        set_float32_products(self.device, config.decoding.precision)
        self.pairs = DevPairs.of(run)

    def translator(self, network: NetworkWeights) -> Translator:
        """Return a greedy translator with this network and as many active experts per token as in training."""
        greedy = replace(self.config.decoding, beam_size=1, experts_per_token=0, retry=False)
        return Translator(network.build(), self.subwords, greedy, self.device, self.longest, directions=self.directions)

    def perplexity(self, translator: Translator, count: int) -> float:
        """Return the perplexity per subword of `count` pairs of the dev set."""
        pairs, world = self.pairs.spread(count).read(translator), World(self.device)
        return perplexity(
            translator.model, self.subwords, pairs.sources, pairs.targets, 4096, world, prefixes=pairs.symbols
        ).pieces

    def show_perplexity(self, old: NetworkWeights, new: NetworkWeights, redraw: float) -> None:
        """Print the perplexity before and after growth, which is equal unless `redraw` is above 0."""
        before, after = (self.perplexity(self.translator(network), _COMPARED) for network in (old, new))
        count = len(self.pairs.spread(_COMPARED).sources)
        jump = f" ({after / before - 1.0:+.1%}, by --redraw {redraw:g})" if redraw else ""
        show(f"perplexity of {count} dev pairs: {before:.4f} before, {after:.4f} after{jump}")

    def shrink(self, options: argparse.Namespace, network: NetworkWeights) -> NetworkWeights:
        """Return the network with fewer experts. UserError if it loses more than --max-loss."""
        translator = self.translator(network)
        pairs = self.pairs.spread(_WATCHED)
        say(f"observing the experts on {len(pairs.sources):,} dev pairs")
        seen = observe(translator.model, self.subwords, *pairs.read(translator))
        if options.merge is not None:
            changed = _merged(network, translator, seen, options.merge)
        else:
            changed = _pruned(network, seen, options.prune)
        self.compare(translator, self.translator(changed), options.max_loss)
        return changed

    def compare(self, before: Translator, after: Translator, max_loss: float) -> None:
        """Print scores before and after; UserError if (mean) BLEU falls by more than `max_loss`."""
        pairs = self.pairs.spread(_TRANSLATED)
        say(f"translating {len(pairs.sources)} dev sentences, before and after")
        found, tokenizers = pairs.compared(pairs.translations(before), pairs.translations(after), self.config)
        show(f"\n{'':30}before     after  difference  p-value (paired bootstrap)")
        for direction, comparisons in found.items():
            for each in comparisons:
                name = f"{each.name} {direction}" if direction else each.name
                show(_score_line(name, each.baseline, each.system) + f"{each.p_value:9.3f}")
        bleu = [comparisons[0] for comparisons in found.values()]
        first, second = fmean(each.baseline for each in bleu), fmean(each.system for each in bleu)
        if len(found) > 1:
            show(_score_line(f"BLEU, mean of {len(found)}", first, second))
        old, new = (self.perplexity(each, _TRANSLATED) for each in (before, after))
        show(_score_line("perplexity", old, new, digits=3))
        show(f"{counted(len(pairs.sources), 'dev sentence')}, greedy search; {tokenizers}\n")
        if not first - second <= max_loss:
            enough = math.ceil(10 * (first - second)) / 10
            raise UserError(
                f"BLEU falls by {first - second:.2f}, from {first:.2f} to {second:.2f}: more than "
                f"--max-loss {max_loss:g}, so nothing was written; --max-loss {enough:g} allows it"
            )


def _score_line(name: str, before: float, after: float, digits: int = 2) -> str:
    return f"{name:>26} {before:9.{digits}f} {after:9.{digits}f} {after - before:+11.{digits}f}"


def _pruned(network: NetworkWeights, seen: Observation, which: str) -> NetworkWeights:
    moe = network.config.moe
    if which == "idle":
        removed = {layer: shrink.idle(moe, layer, use) for layer, use in seen.use.items()}
        if not any(removed.values()):
            raise UserError(
                f"--prune idle: no expert gets less than {shrink.IDLE_SHARE:.0%} of an equal share of the tokens"
            )
    else:
        removed = {layer: shrink.least_useful(moe, layer, use, int(which)) for layer, use in seen.use.items()}
    for layer, experts in removed.items():
        show(f"{layer}: {len(experts)} of {moe.experts_at(layer)} experts removed")
        _print_table([(expert,) for expert in experts], seen.use[layer], [])
    return shrink.prune(network, removed)


def _merged(network: NetworkWeights, translator: Translator, seen: Observation, count: int) -> NetworkWeights:
    pairs: dict[str, list[MergePair]] = {}
    for layer, moe in translator.model.moe_layers().items():
        similarity_EE = output_similarity(moe, seen.sample[layer])
        pairs[layer] = shrink.redundant_pairs(network.config.moe, layer, seen.use[layer], similarity_EE, count)
        show(f"{layer}: {counted(count, 'pair')} of {network.config.moe.experts_at(layer)} experts merged")
        similarities = [pair.similarity for pair in pairs[layer]]
        _print_table([pair[:2] for pair in pairs[layer]], seen.use[layer], similarities)
    return shrink.merge(network, pairs)


def _print_table(members: list[tuple[int, ...]], use: ExpertUse, similarities: list[float]) -> None:
    """Print a line for each expert or pair: its share of the layer's load, gate mass and output mass."""
    if not members:
        return
    width = 8 if max(map(len, members)) == 1 else 16
    head = "".join(f"{name:>{width}}" for name in ("load", "gate", "output"))
    alike = f"{'cosine':>8}" if similarities else ""
    show(f"  {'expert':>{width}}{alike}{head}   (an equal share is {1 / len(use.load_E):.1%})")
    shares_of_use = [shares(values_E) for values_E in use]
    for place, experts in enumerate(members):
        cells = [" + ".join(f"{float(share_E[expert]):.1%}" for expert in experts) for share_E in shares_of_use]
        alike = f"{similarities[place]:>8.3f}" if similarities else ""
        show(f"  {' + '.join(map(str, experts)):>{width}}{alike}" + "".join(f"{cell:>{width}}" for cell in cells))
