"""nmt experts --grow, --prune, --merge: the new runs train on, translate and score; refusals leave nothing."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nmt.commands.dev_pairs
from nmt.checkpoint import list_checkpoints
from nmt.config import Config, ModelConfig, MoEConfig
from nmt.decoding.loading import load_vocabulary
from nmt.decoding.translator import Translator
from nmt.evaluation.scores import Comparison
from nmt.experts.grow import grow
from nmt.experts.observe import most_used, observe
from nmt.experts.surgery import read_network, with_counts, write_run
from nmt.metrics.record import TrainLine, read_lines
from nmt.model.gating import GateOutput
from nmt.parameters import read_tensors
from nmt.run import RunDirectory
from nmt.training.optim import learning_rate
from tests.test_surgery import HIERARCHICAL, network
from tests.toy import Cli, settings, train


@pytest.fixture
def tiny(corpus: Path) -> Path:
    """A run of its own to damage or to reshape, of two updates."""
    return train(corpus, "tiny", 2)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "report" not in path.parts}


def printed_command(out: str) -> list[str]:
    """The arguments of the `nmt train` that the last line of the output names."""
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["nmt", "train"]
    return command[2:]


def printed_config(out: str) -> Config:
    """The configuration that this command trains with."""
    run, *changes = printed_command(out)
    return RunDirectory.existing(run).training_config(changes)


def go_on(cli: Cli, new: Path, steps: int) -> None:
    """Follow the command that the last output names, for `steps` more updates, and use the run that comes of it."""
    command = printed_command(cli.out)
    (before,) = list_checkpoints(new / "checkpoints")
    assert before.score is None
    assert cli("train", *command, f"training.max_steps={before.step + steps}") == 0, cli.err
    assert "resuming from" in cli.err
    after = list_checkpoints(new / "checkpoints")[-1]
    assert after.step == before.step + steps
    assert after.state()["progress"]["target_tokens"] > before.state()["progress"]["target_tokens"]
    assert all(map(math.isfinite, losses(new)))
    for arguments in (
        ("translate", str(new), str(new / "text" / "test.source"), "-o", str(new / "out")),
        ("evaluate", str(new)),
        ("experts", str(new)),
    ):
        assert cli(*arguments) == 0, cli.err
    assert len((new / "out").read_text().splitlines()) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "step"), [("last", 8), ("6", 6)])
def test_a_grown_run_goes_on(cli: Cli, run: Path, tmp_path: Path, checkpoint: str, step: int) -> None:
    before = contents(run)
    new = tmp_path / "some where" / "grown"
    assert cli("experts", str(run), "--grow", "8", "-o", str(new), f"decoding.checkpoint={checkpoint}") == 0, cli.err
    assert contents(run) == before
    (perplexities,) = re.findall(r"perplexity of 8 dev pairs: (\S+) before, (\S+) after", cli.out)
    assert perplexities[0] == perplexities[1]
    assert "encoder.1 4 -> 8 experts, decoder.1 4 -> 8 experts" in cli.out
    config = printed_config(cli.out)
    assert (config.run.name, config.run.directory) == ("grown", str(tmp_path / "some where"))
    assert (config.decoding.checkpoint, config.model.moe.gating, config.model.moe.k) == ("best", "hierarchical", 1)
    (made,) = list_checkpoints(new / "checkpoints")
    source = next(each for each in list_checkpoints(run / "checkpoints") if each.step == step)
    assert (made.step, made.score, made.verify()) == (step, None, None)
    assert made.state()["data"] == source.state()["data"]
    old, tensors = (read_tensors(each.path / "training") for each in (source, made))
    shared = [name for name in old if name in tensors and "moe_layers" not in name]
    assert len(shared) > 30
    assert all(torch.equal(old[name], tensors[name]) for name in shared)
    w_gate = "exp_avg.encoder.moe_layers.moe.1.gate."
    assert torch.equal(tensors[f"{w_gate}primary_w_gate_DA"], old[f"{w_gate}w_gate_DE"])
    assert config.model.moe.straight_through
    assert config.model.moe.copies == 2
    assert made.state()["progress"]["warm_from"] == step
    go_on(cli, new, 3)
    assert losses(new)[0] == pytest.approx(losses(run)[step - 1], rel=0.2)
    # Warmed up over two steps once more.
    rates = [line.learning_rate for line in read_lines(new / "metrics.jsonl", TrainLine)]
    planned = [learning_rate(config.training, step + number) for number in (1, 2, 3)]
    assert rates == pytest.approx([planned[0] / 2, planned[1], planned[2]])
    assert "as planned" not in cli.err
    assert json.loads((new / "metrics.jsonl").read_text().splitlines()[0])["step"] == step + 1


def test_a_run_without_experts_gets_some(cli: Cli, corpus: Path) -> None:
    dense = train(corpus, "dense", 3, "model.moe.num_experts=0")
    assert cli("experts", str(dense), "--grow", "4", "-o", "sparse") == 0, cli.err
    assert "encoder.1 0 -> 4 experts, decoder.1 0 -> 4 experts" in cli.out
    assert list_checkpoints(corpus / "sparse" / "checkpoints")[-1].state()["progress"]["warm_from"] == 3
    assert "frozen" not in cli.out
    go_on(cli, corpus / "sparse", 3)
    steps = [
        float(value)
        for name, value in read_tensors(
            list_checkpoints(corpus / "sparse" / "checkpoints")[-1].path / "training"
        ).items()
        if name.startswith("step.")
    ]
    assert set(steps) == {3.0, 6.0}


@pytest.mark.slow
def test_redrawing_says_what_it_costs_and_biases_grow_with_the_experts(cli: Cli, corpus: Path) -> None:
    run = train(corpus, "a", 2, "model.moe.bias_rate=0.01")
    assert cli("experts", str(run), "--grow", "8", "--redraw", "0.5", "-o", "b") == 0, cli.err
    (found,) = re.findall(r"perplexity of 8 dev pairs: (\S+) before, (\S+) after \((\S+)%, by --redraw 0.5\)", cli.out)
    before, after, jump = map(float, found)
    assert before != after
    assert jump == pytest.approx(100 * (after / before - 1), abs=0.06)
    gate = "encoder.moe_layers.moe.1.gate."
    old, new = (read_tensors(list_checkpoints(corpus / name / "checkpoints")[-1].path / "model") for name in "ab")
    assert old[f"{gate}bias_E"].any()
    assert torch.equal(new[f"{gate}primary_bias_A"], old[f"{gate}bias_E"])
    assert not new[f"{gate}bias_E"].any()
    go_on(cli, corpus / "b", 3)
    after = read_tensors(list_checkpoints(corpus / "b" / "checkpoints")[-1].path / "model")
    assert after[f"{gate}bias_E"].any()
    assert cli("experts", str(corpus / "b"), "--prune", "4", "-o", "c", "--max-loss", "100") == 0, cli.err
    assert printed_config(cli.out).model.moe.copies == 1
    progress = list_checkpoints(corpus / "c" / "checkpoints")[-1].state()["progress"]
    assert progress["warm_from"] == 2
    go_on(cli, corpus / "c", 1)
    assert cli("export", str(corpus / "c"), str(corpus / "exported")) == 0, cli.err
    assert (
        cli("translate", str(corpus / "exported"), str(run / "text" / "test.source"), "-o", str(corpus / "out")) == 0
    ), cli.err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["gates"]], ids=str)
def test_new_experts_learn_another_corpus_by_the_printed_command(cli: Cli, corpus: Path, more: list[str]) -> None:
    run = train(corpus, "a", 2, "model.moe.bias_rate=0.01")
    assert cli("experts", str(run), "--grow", "12", "-o", "b") == 0, cli.err
    lines = cli.out.splitlines()
    printed = shlex.split(lines[lines.index("on another corpus, with the earlier experts frozen:") + 1])
    freeze = next(word for word in printed if word.startswith("training.freeze="))
    assert freeze == 'training.freeze=["experts[::3]"]'
    assert f"run.start_from={corpus / 'b'}" in printed
    own = [word for word in settings(corpus, "run.name=c", "training.max_steps=3") if not word.startswith("model")]
    freeze = f'training.freeze=["experts[::3]"{"".join(f",{part}" for part in more)}]'
    words = ["model=inherited", f"run.start_from={corpus / 'b'}", freeze, "training.checkpoint_every=1"]
    assert cli("train", *own, *words) == 0, cli.err
    old, new = (read_tensors(list_checkpoints(corpus / name / "checkpoints")[-1].path / "model") for name in "bc")
    assert old.keys() == new.keys()
    for name in old:
        if "experts" in name:
            same = [torch.equal(a, b) for a, b in zip(old[name], new[name], strict=True)]
            assert same[::3] == [True] * 4
            assert not all(same)
        elif ".gate." in name and more:
            assert torch.equal(old[name], new[name]), name
        elif "bias_E" in name:
            assert not torch.equal(old[name], new[name])


@pytest.mark.slow
def test_a_run_without_experts_gets_some_with_a_factored_moment_and_grows_again(
    cli: Cli,
    corpus: Path,
) -> None:
    train(corpus, "dense", 2, "model.moe.num_experts=0", "training.expert_optimizer=factored")
    assert cli("experts", str(corpus / "dense"), "--grow", "4", "-o", "sparse") == 0, cli.err
    go_on(cli, corpus / "sparse", 2)
    for task, count, new in (("--grow", 8, "grown"), ("--merge", 4, "merged")):
        source = corpus / ("sparse" if new == "grown" else "grown")
        assert cli("experts", str(source), task, str(count), "-o", new, "--max-loss", "100") == 0, cli.err
    row = "exp_avg_sq_row.encoder.moe_layers.moe.1.experts.weights.0"
    old, grown = (
        read_tensors(list_checkpoints(corpus / name / "checkpoints")[-1].path / "training")
        for name in ("sparse", "grown")
    )
    assert old[row].any()
    assert torch.equal(grown[row], old[row].repeat_interleave(2, dim=0))
    go_on(cli, corpus / "merged", 2)


@pytest.mark.slow
def test_a_run_grown_twice_then_pruned_and_merged_goes_on(cli: Cli, tiny: Path) -> None:
    tasks = [("--grow", 8, 8), ("--grow", 24, 24), ("--prune", 8, 16), ("--merge", 4, 12), ("--merge", 4, 8)]
    source = tiny
    for number, (task, count, left) in enumerate(tasks):
        name = f"new{number}"
        assert cli("experts", str(source), task, str(count), "-o", name, "--max-loss", "100") == 0, cli.err
        assert f"-> {left} experts, decoder.1" in cli.out
        source = tiny.parent / name
    go_on(cli, source, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "gating"),
    [
        ("--prune", "strictly_balanced"),
        ("--merge", "noisy_top_k"),
        pytest.param("--prune", "noisy_top_k", marks=pytest.mark.slow),
        pytest.param("--merge", "softmax_top_k", marks=pytest.mark.slow),
    ],
)
def test_a_flat_run_shrinks_and_goes_on(cli: Cli, corpus: Path, task: str, gating: str) -> None:
    run = train(corpus, "flat", 2, f"model.moe.gating={gating}")
    before = contents(run)
    assert cli("experts", str(run), task, "2", "-o", f"{corpus}/few", "--max-loss", "100") == 0, cli.err
    assert contents(run) == before
    for words in ("encoder.1 4 -> 2 experts, decoder.1 4 -> 2 experts", "BLEU", "chrF2", "perplexity", "bootstrap"):
        assert words in cli.out
    assert len(re.findall(r"^ +\d( \+ \d)? .*%$", cli.out, re.MULTILINE)) == 4
    go_on(cli, corpus / "few", 2)


def without_work(source: Path, new: Path, idle: dict[str, list[int]]) -> None:
    """A copy of a run with k = 1 whose gates have columns v, -v and, for these experts, 0: never the largest."""
    run = RunDirectory(source)
    config = run.config()
    subwords = load_vocabulary(run)
    network, checkpoint = read_network(run, config, subwords.fingerprint, subwords.size)
    layers = {}
    for layer, experts in idle.items():
        weights = network.layer(layer)
        w_DE = torch.randn(weights["gate.w_gate_DE"].value.shape)
        w_DE[:, 1] = -w_DE[:, 0]
        w_DE[:, experts] = 0.0
        layers[layer] = weights | {"gate.w_gate_DE": weights["gate.w_gate_DE"]._replace(value=w_DE)}
    write_run(new, run, config, network.with_layers(config.model, layers), checkpoint, False)


@pytest.mark.slow
def test_idle_experts_go_and_layers_may_differ_then(cli: Cli, corpus: Path) -> None:
    source, run = train(corpus, "source", 2, "model.moe.k=1"), corpus / "run"
    without_work(source, run, {"encoder.1": [2, 3], "decoder.1": [3]})
    assert cli("experts", str(run), "--prune", "idle", "-o", "busy") == 0, cli.err
    assert "encoder.1 4 -> 2 experts, decoder.1 4 -> 3 experts" in cli.out
    # No token chose them: nothing changed.
    assert re.search(r"BLEU +(\S+) +\1 +\+0.00 +1.000", cli.out)
    config = printed_config(cli.out)
    assert [config.model.moe.experts_at(layer) for layer in ("encoder.1", "decoder.1")] == [2, 3]
    go_on(cli, corpus / "busy", 2)
    cli.refuses(2, "experts", str(corpus / "busy"), "--grow", "6", "-o", "x", says=("encoder.1 2, decoder.1 3",))


def test_nothing_idle(cli: Cli, run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    says = ("no expert gets less than 5%",)
    cli.refuses(2, "experts", str(run), "--prune", "idle", "-o", str(new), says=says, progress=True)
    assert not list(tmp_path.iterdir())


def test_counts_of_layers_become_settings() -> None:
    moe = MoEConfig(4, k=2)
    config = ModelConfig(encoder_moe_after=[1, 3], moe=moe)
    for counts, usual in (((3, 3, 3), 3), ((3, 4, 4), 4), ((4, 3, 3), 3), ((2, 3, 4), 4)):
        changed = with_counts(config, dict(zip(config.moe_layer_names(), counts, strict=True))).moe
        assert [changed.experts_at(layer) for layer in config.moe_layer_names()] == list(counts)
        assert changed.num_experts == usual
        assert len(changed.num_experts_at) == sum(count != usual for count in counts)


def test_observing_counts_every_token_once_and_samples_evenly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(run)
    translator = Translator.load(directory, directory.config())
    sources, targets, _ = directory.text("test")
    numbers = {
        "encoder.1": sum(len(line) + 1 for line in translator.subwords.encode_batch(sources)),
        "decoder.1": sum(len(line) + 1 for line in translator.subwords.encode_batch(targets)),
    }
    arguments = (translator.model, translator.subwords, sources, targets)
    whole, part = observe(*arguments, sample_tokens=10**6), observe(*arguments, sample_tokens=40)
    for layer, number in numbers.items():
        assert whole.use[layer].load_E.sum() == 2 * number
        assert whole.use[layer].gate_E.sum() == pytest.approx(number)
        assert len(whole.sample[layer]) == number
        assert 20 < len(part.sample[layer]) < 60
        assert torch.equal(part.use[layer].load_E, whole.use[layer].load_E)
    monkeypatch.setattr("nmt.experts.observe._BATCH_TOKENS", 40)
    by_few = observe(*arguments, sample_tokens=10**6)
    for layer in numbers:
        for few, all_at_once in zip(by_few.use[layer], whole.use[layer], strict=True):
            torch.testing.assert_close(few, all_at_once, rtol=1e-4, atol=1e-4)
        assert by_few.sample[layer].sum() == pytest.approx(float(whole.sample[layer].sum()), rel=1e-3)


@pytest.mark.parametrize("layer", ["encoder.1", "decoder.1"])
def test_the_most_used_expert_of_a_sentence_is_that_of_the_sentence_alone(run: Path, layer: str) -> None:
    directory = RunDirectory(run)
    translator = Translator.load(directory, directory.config())
    sources, targets, _ = directory.text("test")
    model, subwords = translator.model, translator.subwords
    sources, targets = [*sources, ""], [*targets, ""]
    alone = [
        int(observe(model, subwords, [source], [target]).use[layer].gate_E.argmax())
        for source, target in zip(sources, targets, strict=True)
    ]
    assert most_used(model, subwords, sources, targets, layer) == alone
    assert len(set(alone)) > 1


def test_sentences_whose_tokens_have_no_expert(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(run)
    translator = Translator.load(directory, directory.config())
    sources, targets, _ = directory.text("test")
    gates = type(translator.model).gates

    def emptied(*arguments: object) -> dict[str, GateOutput]:
        found = gates(*arguments)
        return {
            layer: gate._replace(expert_TK=torch.full_like(gate.expert_TK, 4), gates_TK=gate.gates_TK * 0)
            for layer, gate in found.items()
        }

    monkeypatch.setattr(type(translator.model), "gates", emptied)
    found = most_used(translator.model, translator.subwords, sources, targets, "encoder.1")
    assert found == [-1] * len(sources)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.slow
@pytest.mark.parametrize("task", [("--prune", "1"), ("--merge", "1")], ids=str)
def test_a_loss_of_bleu_beyond_what_is_allowed_leaves_nothing(
    cli: Cli,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: tuple[str, str],
) -> None:
    falls = Comparison("BLEU", 31.0, 29.66, 0.01, (30.0, 32.0), (28.0, 31.0))
    monkeypatch.setattr(nmt.commands.dev_pairs, "paired_bootstrap", lambda *_: [falls])
    arguments = ("experts", str(run), *task, "-o", str(tmp_path / "new"))
    assert cli(*arguments) == 2
    line = cli.err.splitlines()[-1]
    assert "Traceback" not in cli.err
    assert "BLEU falls by 1.34, from 31.00 to 29.66" in line
    assert "--max-loss 0.5, so nothing was written; --max-loss 1.4 allows it" in line
    assert cli(*arguments, "--max-loss", "1.3") == 2
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, "--max-loss", "1.4") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grow", "8", "-o", "{run}"], ("already exists",)),
        (["--grow", "8", "-o", ".."], ("name the folder",)),
        (["--grow", "8", "-o", ""], ("name the folder",)),
        (["--grow", "0"], ("--grow 0", "at least 1")),
        (["--grow", "8", "--redraw", "2"], ("--redraw 2", "from 0 to 1")),
        (["--prune", "1", "--redraw", "0.5"], ("--redraw goes with --grow",)),
        (["--grow", "6"], ("--grow 6", "4 experts can grow to 8, 12, 16")),
        (["--grow", "8", "decoding.checkpoint=average"], ("average", "no optimiser state")),
        (["--prune", "some"], ("--prune some", "or idle")),
        (["--prune", "3"], ("would leave 1 of 4", "k=2")),
        (["--merge", "-1"], ("--merge -1", "at least 1")),
        (["--merge", "3"], ("would leave 1 of 4",)),
    ],
    ids=str,
)
def test_mistakes(
    cli: Cli,
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    says: tuple[str, ...],
) -> None:
    arguments = [each.format(run=run) for each in arguments]
    if "-o" not in arguments:
        arguments += ["-o", str(tmp_path / "new")]
    before = sorted(run.parent.iterdir())
    cli.refuses(2, "experts", str(run), *arguments, says=says)
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        ({}, 6, "4 experts can grow to 8, 12, 16"),
        ({}, 4, "4 experts can grow to 8"),
        ({}, 2, "4 experts can grow to 8"),
        ({"gating": "softmax_top_k"}, 8, "gating=softmax_top_k"),
        ({"gating": "strictly_balanced"}, 8, "gating=strictly_balanced"),
        (HIERARCHICAL | {"k": 2}, 12, "gating=hierarchical and k=2"),
        ({"num_experts_at": {"encoder.2": 6}}, 8, "encoder.2 6, decoder.1 4"),
        ({"encoder_moe_after": [], "decoder_moe_after": []}, 8, "there is none"),
        ({"num_experts": 0}, 1, "k=2"),
        ({"num_experts": 0, "output": "sigmoid"}, 4, "sigmoid"),
        ({"num_experts": 0, "encoder_moe_after": [], "decoder_moe_after": []}, 4, "no place"),
    ],
)
def test_what_cannot_grow(
    tiny_config: Callable[..., ModelConfig], changes: dict[str, Any], size: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        grow(network(tiny_config(**changes)), size, seed=1)


def test_a_failure_while_writing_leaves_nothing(
    cli: Cli,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "write_text", full)
    assert cli("experts", str(run), "--grow", "8", "-o", str(tmp_path / "new")) == 6
    assert f"cannot write {tmp_path / 'new'}: No space left on device" in cli.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_patience_and_best_begin_anew_and_a_dial_is_not_kept(cli: Cli, corpus: Path) -> None:
    stops = ("training.validate_every=1", "training.patience=1", "training.learning_rate=1.0e-30")
    run = train(corpus, "a", 9, *stops, "decoding.experts_per_token=1", "decoding.checkpoint=last")
    assert list_checkpoints(run / "checkpoints")[-1].state()["progress"]["validations_since_best"] == 1
    assert cli("experts", str(run), "--grow", "8", "-o", "b") == 0, cli.err
    assert "decoding.experts_per_token=1 becomes 0 in the new run" in cli.err
    assert printed_config(cli.out).decoding.checkpoint == "last"
    progress = list_checkpoints(corpus / "b" / "checkpoints")[-1].state()["progress"]
    assert (progress["validations_since_best"], progress["best_score"]) == (0, math.inf)
    go_on(cli, corpus / "b", 1)
