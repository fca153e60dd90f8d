"""Exported models: translate as the run does, complete or not there, every damage found, nothing unpickled."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors import safe_open

from nmt.checkpoint import Checkpoint, list_checkpoints, seal
from nmt.compose import compose_config
from nmt.config import NUM_ADDED_PIECES, FilesConfig, MoEConfig, RunConfig
from nmt.cost.operations import model_cost
from nmt.decoding.translator import Translator
from nmt.lock import locked
from nmt.model.seq2seq import Seq2Seq
from nmt.pages.card import CardFacts, SetScores, model_card
from nmt.pages.markdown import code
from nmt.parameters import read_model, write_parameters
from nmt.run import RunDirectory
from tests.toy import Cli, settings, write_corpus

FILES = ("README.md", "config.yaml", "corpus.json", "manifest.json", "model.safetensors", "subwords.model")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that nobody has evaluated."""
    path = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(path / "report", ignore_errors=True)
    return path


@pytest.fixture
def exported(cli: Cli, run: Path, tmp_path: Path) -> Path:
    assert cli("export", str(run), str(tmp_path / "exported")) == 0, cli.err
    assert cli.out == f"{tmp_path / 'exported'}\n"
    return tmp_path / "exported"


@pytest.fixture
def text(run: Path, tmp_path: Path) -> tuple[str, str]:
    """Files with the sources and references of the run's test set."""
    return str(run / "text" / "test.source"), str(run / "text" / "test.target")


def translator(path: Path, *overrides: str) -> Translator:
    directory = RunDirectory.existing(str(path))
    return Translator.load(directory, directory.config(list(overrides)))


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def vouch(path: Path) -> None:
    """Write the manifest anew, for the files as they are."""
    manifest = {key: value for key, value in manifest_of(path).items() if key not in ("files", "sha256", "torch")}
    (path / "manifest.json").unlink()
    seal(path, manifest)


# ----------------------------------------------------------------------------------------------- the same model


@pytest.mark.slow
@pytest.mark.parametrize("which", ["best", "last", "average", "4"])
def test_it_translates_exactly_as_the_run_does(cli: Cli, run: Path, tmp_path: Path, which: str) -> None:
    overrides = (f"decoding.checkpoint={which}", "decoding.beam_size=3")
    assert cli("export", str(run), str(tmp_path / "out"), *overrides) == 0, cli.err
    ours, theirs = translator(tmp_path / "out"), translator(run, *overrides)
    assert ours.options == theirs.options
    sources = [*RunDirectory(run).text("test")[0], "", "the meadow ?"]
    assert ours.translate(sources) == theirs.translate(sources)
    assert len({translation.text for translation in ours.translate(sources)}) > 1
    parameters = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    assert ours.steps == theirs.steps
    assert len(ours.steps) == (3 if which == "average" else 1)


def test_each_step_has_parameters_of_its_own(cli: Cli, run: Path, tmp_path: Path) -> None:
    for step in ("2", "8"):
        assert cli("export", str(run), str(tmp_path / step), f"decoding.checkpoint={step}") == 0
    hashes = [manifest_of(tmp_path / step)["files"]["model.safetensors"]["sha256"] for step in ("2", "8")]
    assert hashes[0] != hashes[1]


def test_commands_take_it_like_the_run(cli: Cli, run: Path, exported: Path, text: tuple[str, str]) -> None:
    source, reference = text
    outputs = []
    for path in (run, exported):
        assert cli("evaluate", str(path), "--source", source, "--reference", reference) == 0, cli.err
        outputs.append(re.sub(r"\S+$", "", cli.out.splitlines()[1]))  # without the speed
    assert outputs[0] == outputs[1]
    (report,) = (exported / "report").glob("set-test.source-*.json")
    assert json.loads(report.read_text())["steps"] == manifest_of(exported)["steps"]
    # Reports lie beside what the manifest vouches for.
    assert cli("experts", str(exported), "--explain", "the dog") == 0, cli.err
    assert cli("experts", str(exported), "--source", source, "--reference", reference) == 0, cli.err
    assert list((exported / "report").glob("experts-set-test.source-*.html"))
    for path in (run, exported):
        assert cli("cost", str(path)) == 0, cli.err
        outputs.append(cli.out.splitlines()[1:10])
    assert outputs[2] == outputs[3]
    assert cli("translate", str(exported), source) == 0, cli.err
    assert cli.out.count("\n") == 12
    assert sorted(os.listdir(exported)) == sorted([*FILES, "report"])


def test_what_it_cannot_do_is_told_in_one_line(cli: Cli, run: Path, exported: Path, tmp_path: Path) -> None:
    name = str(exported)
    cli.refuses(3, "evaluate", name, says=("has no test set", "give --source and --reference"))
    cli.refuses(3, "experts", name, says=("has no test set", "give --source and --reference"))
    (tmp_path / "in").write_text("the dog\n")
    for which in ("last", "average", "8"):
        arguments = ("translate", name, str(tmp_path / "in"), f"decoding.checkpoint={which}")
        cli.refuses(2, *arguments, says=(f"decoding.checkpoint={which}", "is an exported model", "leave it out"))
    assert cli("translate", name, str(tmp_path / "in"), "decoding.checkpoint=best") == 0
    cli.refuses(
        2, "experts", name, "--grow", "8", "-o", "new", says=("is an exported model", "the run it was exported from")
    )
    cli.refuses(2, "export", name, str(tmp_path / "new"), says=("is already an exported model",))
    assert not (tmp_path / "new").exists()


def test_it_cannot_be_trained_on(cli: Cli, exported: Path, corpus: Path) -> None:
    before = {name: (exported / name).read_bytes() for name in FILES}
    arguments = settings(corpus, "run.name=exported", "training.max_steps=9", "training.micro_batches=2")
    for processes in ((), ("--processes", "2")):
        says = ("is an exported model", "choose another run.name")
        cli.refuses(4, "train", *processes, *arguments, says=says)
    assert {name: (exported / name).read_bytes() for name in os.listdir(exported)} == before
    # It was refused before the corpus was prepared.
    assert not (corpus / "p").exists()


# ---------------------------------------------------------------------------------------------------- what is in it


def test_the_folder_holds_the_parameters_once_and_hashes_of_all(run: Path, exported: Path) -> None:
    assert sorted(os.listdir(exported)) == list(FILES)
    manifest = manifest_of(exported)
    assert manifest["format"] == 1
    assert manifest["files"].keys() == set(FILES) - {"manifest.json", "README.md"}
    for name, written in manifest["files"].items():
        content = (exported / name).read_bytes()
        assert (written["size"], written["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert ("tensors" in written) == (name == "model.safetensors")
    scores = {checkpoint.step: checkpoint.score for checkpoint in list_checkpoints(run / "checkpoints")}
    best = min(scores, key=lambda step: scores[step] or 0.0)
    assert (manifest["steps"], manifest["score"]) == ([best], scores[best])
    with safe_open(exported / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert hashes.items() <= manifest["files"]["model.safetensors"]["tensors"].items()
    config = RunDirectory(run).config()
    assert (
        sum(tensor.numel() for tensor in tensors.values())
        == model_cost(config.model, NUM_ADDED_PIECES + 96).num_parameters
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # Whoever may read one file may read all.
    assert len({(exported / name).stat().st_mode for name in FILES}) == 1


def test_no_text_and_no_folder_of_this_machine_goes_along(run: Path, exported: Path) -> None:
    lines = [line for line in RunDirectory(run).text("test")[0] if " " in line]
    assert lines
    for name in ("config.yaml", "corpus.json", "manifest.json", "README.md"):
        content = (exported / name).read_text()
        assert str(run.parent) not in content, name
        assert not any(line in content for line in lines), name
    assert json.loads((exported / "corpus.json").read_text()) == json.loads((run / "corpus.json").read_text())


def test_the_same_checkpoint_gives_the_same_bytes(cli: Cli, run: Path, exported: Path, tmp_path: Path) -> None:
    assert cli("export", str(run), str(tmp_path / "again")) == 0
    assert all((tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax_top_k", "hierarchical", "strictly_balanced"])
def test_parameters_of_any_network_come_back(tmp_path: Path, tiny_config: Any, gating: str, tied: bool) -> None:
    groups = {"branching": 2, "primary_k": 1} if gating == "hierarchical" else {}
    moe = MoEConfig(num_experts=4, k=2, hidden_sizes=[7], gating=gating, **groups)
    config = replace(tiny_config(tie_embeddings=tied, output_bias=not tied), moe=moe)
    written = Seq2Seq(config, 13)
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.normal_()
    write_parameters(written, tmp_path / "model.safetensors")
    seal(tmp_path, {"format": 1, "step": 1, "steps": [1], "vocabulary": "words"})
    read = read_model([Checkpoint(tmp_path, 1, manifest_of(tmp_path))], config, 13, "words")
    own = dict(read.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in written.named_parameters())


# -------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", sorted(set(FILES) - {"README.md"}))
def test_every_damage_is_found_before_use(cli: Cli, exported: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "in").write_text("the dog\n")
    path = exported / name
    content = path.read_bytes()
    damaged: list[bytes | None] = [content[: len(content) // 2], content[:-1], b"", b"\0" * len(content), None]
    for place in (0.05, 0.4, 0.95):
        flipped = bytearray(content)
        flipped[int(place * len(content))] ^= 4
        damaged.append(bytes(flipped))
    for each in damaged:
        path.unlink()
        if each is not None:
            path.write_bytes(each)
        cli.refuses(4, "translate", str(exported), str(tmp_path / "in"), says=(name, "copy it again"))
        path.write_bytes(content)
    assert cli("translate", str(exported), str(tmp_path / "in")) == 0


@pytest.mark.parametrize("older", [False, True])
def test_the_card_may_be_changed(cli: Cli, exported: Path, tmp_path: Path, older: bool) -> None:
    """For instance to add a licence, or what a hub wants at its beginning."""
    (tmp_path / "in").write_text("the dog\n")
    if older:
        # Older versions had the card in the manifest.
        card_file = exported / "README.md"
        manifest = {key: value for key, value in manifest_of(exported).items() if key != "sha256"}
        found = {"size": card_file.stat().st_size, "sha256": hashlib.sha256(card_file.read_bytes()).hexdigest()}
        manifest["files"]["README.md"] = found
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (exported / "manifest.json").write_text(json.dumps(manifest))
    text = (exported / "README.md").read_text()
    (exported / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n{text}")
    assert cli("translate", str(exported), str(tmp_path / "in")) == 0, cli.err
    (exported / "README.md").unlink()
    assert cli("translate", str(exported), str(tmp_path / "in")) == 0, cli.err


def test_another_vocabulary_of_the_same_size(cli: Cli, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    write_corpus(folder, seed=5)
    assert cli("prepare", *settings(folder)) == 0
    shutil.copy(Path(cli.out.strip()) / "subwords.model", exported / "subwords.model")
    cli.refuses(4, "cost", str(exported), says=("subwords.model",))
    # Nor is it taken if it was put into the manifest: it is not what the parameters were trained with.
    vouch(exported)
    (tmp_path / "in").write_text("the dog\n")
    cli.refuses(4, "translate", str(exported), str(tmp_path / "in"), says=("another vocabulary",))


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_nothing_is_unpickled_whatever_the_manifest_says(cli: Cli, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("the dog\n")
    arguments = ("translate", str(exported), str(tmp_path / "in"))
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Evil(canary))
    pickle.loads(pickled)
    canary.unlink()
    for name in ("model.pt", "pytorch_model.bin"):
        (exported / name).write_bytes(pickled)
    assert cli(*arguments) == 0
    (exported / "model.safetensors").write_bytes(pickled)
    vouch(exported)
    cli.refuses(4, *arguments, says=(str(exported), "no valid safetensors"))
    assert not canary.exists()


def test_parameters_that_the_manifest_does_not_list_are_not_read(cli: Cli, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("the dog\n")
    shutil.copy(exported / "model.safetensors", exported / "a.safetensors")
    cli.refuses(4, "translate", str(exported), str(tmp_path / "in"), says=("a.safetensors does not belong to it",))


def test_a_folder_of_another_format(cli: Cli, exported: Path) -> None:
    manifest = manifest_of(exported)
    del manifest["files"], manifest["sha256"]
    seal(exported, manifest | {"format": 3})
    cli.refuses(4, "cost", str(exported), says=("format 3", "reads formats 1 and 2"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_export_in_bf16_translates_as_the_run_does_in_bf16(
    cli: Cli, run: Path, tmp_path: Path, exported: Path, precision: str
) -> None:
    assert cli("export", "--bf16", str(run), str(tmp_path / "half")) == 0, cli.err
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", exported)]
    assert sizes[0] < 0.8 * sizes[1]
    card = " ".join((tmp_path / "half" / "README.md").read_text().split())
    assert "in bf16 or, where precision counts, float32" in card
    ours = translator(tmp_path / "half", f"decoding.precision={precision}")
    theirs = translator(run, "decoding.precision=bf16")
    mine, other = (dict(each.model.named_parameters()) for each in (ours, theirs))
    for name, parameter in other.items():
        assert torch.equal(mine[name].to(parameter.dtype), parameter), name
        # Products in float32 have their weights in it, except experts: those are cast when they are needed.
        if precision == "bf16" or "experts" in name:
            assert mine[name].dtype == parameter.dtype, name
        else:
            assert mine[name].dtype == torch.float32, name
    sources = RunDirectory(run).text("test")[0]
    if precision == "bf16":
        assert ours.translate(sources) == theirs.translate(sources)
    else:
        assert len(ours.translate(sources)) == len(sources)


# ------------------------------------------------------------------------------------------------------- writing


def test_where_it_may_be_written(cli: Cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for folder, says in (
        ("full", "full is not empty"),
        ("full/file", "is a file"),
        (str(copy), "is a run"),
        (str(copy / "new"), f"is in {copy}"),
        ("copy/report/../a/b", f"is in {copy}"),
    ):
        cli.refuses(2, "export", str(copy), folder, says=(says,))
    before = sorted(os.listdir(copy))
    assert cli("export", "copy", "empty") == 0, cli.err
    assert cli("export", "copy", "new/folder/") == 0, cli.err
    assert sorted(os.listdir("empty")) == sorted(os.listdir("new/folder")) == list(FILES)
    cli.refuses(2, "export", "copy", "empty", says=("is a run or an exported model",))
    cli.refuses(2, "export", "copy", "empty/deeper", says=("is in",))
    assert sorted(os.listdir(copy)) == before
    assert sorted(os.listdir(tmp_path)) == ["copy", "empty", "full", "new"]


@pytest.mark.parametrize(
    "place", [*(f"commands.export.{name}" for name in ("write_parameters", "model_card", "seal")), "files.sync"]
)
def test_a_failure_leaves_nothing(
    cli: Cli,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"nmt.{place}", fail)
    cli.refuses(6, "export", str(copy), str(tmp_path / "out"), says=("cannot write", "out", "No space left"))
    assert os.listdir(tmp_path) == ["copy"]


def test_two_exports_do_not_meet_in_one_folder(cli: Cli, copy: Path, tmp_path: Path) -> None:
    with locked(tmp_path / ".out.lock"):
        cli.refuses(2, "export", str(copy), str(tmp_path / "out"), says=("is being written by pid", "name another"))
    assert os.listdir(tmp_path) == ["copy"]
    assert cli("export", str(copy), str(tmp_path / "out")) == 0
    assert sorted(os.listdir(tmp_path)) == ["copy", "out"]


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may become larger than this: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_real_failure_leaves_nothing(cli: Cli, copy: Path, tmp_path: Path, small_files: int) -> None:
    model = next((copy / "checkpoints").glob("step-*/model/*.safetensors"))
    assert model.stat().st_size > small_files
    cli.refuses(6, "export", str(copy), str(tmp_path / "out"), says=("cannot write", "File too large"))
    assert sorted(os.listdir(tmp_path)) == ["copy"]


# ----------------------------------------------------------------------------------------------------- the card


def card(path: Path) -> str:
    return " ".join((path / "README.md").read_text().split())


@pytest.mark.slow
def test_the_card_has_the_scores_of_the_exported_parameters_alone(cli: Cli, copy: Path, tmp_path: Path) -> None:
    for name, which in (("a", "8"), ("b", "average")):
        assert cli("export", str(copy), str(tmp_path / name), f"decoding.checkpoint={which}") == 0
        assert "run nmt evaluate before" in cli.err
        assert "`nmt evaluate` had not been run on these parameters" in card(tmp_path / name)
        assert manifest_of(tmp_path / name)["scores"] == []
    validated = list_checkpoints(copy / "checkpoints")[-1].score
    assert f"perplexity {validated:.3f} per subword at step 8." in card(tmp_path / "a")
    assert "the mean of those after steps 4, 6, 8 of run `run`" in card(tmp_path / "b")
    assert "Their mean was not validated." in card(tmp_path / "b")
    assert manifest_of(tmp_path / "b")["score"] is None

    assert cli("evaluate", str(copy), "decoding.checkpoint=last", "decoding.beam_size=2") == 0
    assert cli("evaluate", str(copy), "--split", "dev", "decoding.checkpoint=2") == 0
    # Other reports have no scores of a set.
    assert cli("experts", str(copy)) == 0
    assert cli("evaluate", str(copy), "--dial", "1") == 0
    report = json.loads((copy / "report" / "test.json").read_text())
    assert cli("export", str(copy), str(tmp_path / "c"), "decoding.checkpoint=8") == 0
    assert "BLEU" not in cli.err
    bleu, chrf = (report["scores"][name] for name in ("BLEU", "chrF2"))
    found = card(tmp_path / "c")
    scores = " | ".join(f"{each['score']:.2f}" for each in report["scores"].values())
    assert scores.startswith(f"{bleu['score']:.2f} | {chrf['score']:.2f} | ")
    assert f"| `test` | 12 | {scores} | {report['perplexity']:.3f} | beam 2," in found
    assert f"- BLEU: sacreBLEU `{bleu['signature']}`" in found
    assert f"- chrF2: sacreBLEU `{chrf['signature']}`" in found
    assert "had not been run" not in found
    assert "Not shown, because they belong to other parameters: the scores of `dev` (step 2)." in found
    (kept,) = manifest_of(tmp_path / "c")["scores"]
    assert (kept["name"], kept["steps"], kept["scores"]) == ("test", [8], report["scores"])

    assert cli("export", str(copy), str(tmp_path / "d"), "decoding.checkpoint=4") == 0
    assert "`dev` (step 2), `test` (step 8)" in card(tmp_path / "d")

    # A score that only one set has.
    assert cli("evaluate", str(copy), "--split", "dev", "--ter", "decoding.checkpoint=8") == 0
    assert cli("export", str(copy), str(tmp_path / "e"), "decoding.checkpoint=8") == 0
    assert "| `dev` | 8 |" in card(tmp_path / "e")
    assert "- TER: sacreBLEU `nrefs:1|case:lc|tok:tercom" in card(tmp_path / "e")
    (row,) = (line for line in (tmp_path / "e" / "README.md").read_text().splitlines() if line.startswith("| `test`"))
    assert " - |" in row


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # Older versions said neither; a file called test was scored under this name.
        ({"own": None}, "own is missing"),
        ({"steps": None}, "steps is missing"),
        ({"own": False}, "other text than the run's own"),
        ({"scores": {"BLEU": {"score": "100", "signature": "s"}}}, "scores.BLEU.score: '100' is not a number"),
        ({"perplexity": [1]}, "perplexity: [1] is not a number"),
    ],
    ids=str,
)
def test_a_report_that_may_be_of_other_text_stays_out_of_the_card(
    cli: Cli, copy: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    assert cli("evaluate", str(copy)) == 0
    path = copy / "report" / "test.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    assert cli("export", str(copy), str(tmp_path / "out")) == 0, cli.err
    assert f"{path} is left out of the card" in cli.err
    assert says in cli.err
    assert "had not been run" in card(tmp_path / "out")
    assert manifest_of(tmp_path / "out")["scores"] == []


def test_scores_of_other_text_stay_out_of_the_card(cli: Cli, copy: Path, tmp_path: Path) -> None:
    source = tmp_path / "test"
    source.write_text("the dog\n")
    assert cli("evaluate", str(copy), "--source", str(source), "--reference", str(source)) == 0
    assert cli("evaluate", str(copy)) == 0
    assert cli("export", str(copy), str(tmp_path / "out")) == 0
    assert card(tmp_path / "out").count("| `test` | 12 |") == 1
    assert "set-" not in card(tmp_path / "out")


def test_the_card_says_what_the_model_is_and_was_trained_on(run: Path, exported: Path) -> None:
    found = card(exported)
    info = json.loads((run / "corpus.json").read_text())
    size = (exported / "model.safetensors").stat().st_size
    cost = model_cost(RunDirectory(run).config().model, NUM_ADDED_PIECES + 96)
    for part in (
        "# run: translates en to de",
        "| corpus | `toy` |",
        "| source | files: en `train.en`; de `train.de` |",
        f"| pairs | {info['pairs_read']} read, {info['pairs_kept']} kept,",
        f"| fingerprint | `{info['fingerprint']}` |",
        f"| its sha256 | `{hashlib.sha256((run / 'subwords.model').read_bytes()).hexdigest()}` |",
        "| vocabulary | 424 subwords for both languages (SentencePiece BPE, nfc) |",
        "| experts | 4 after encoder LSTM 1; 4 after decoder LSTM 1; each with 16 hidden units |",
        "| gating | noisy top-k, k = 2 (section 2.1 of the paper) |",
        f"| **all** | **{cost.num_parameters:,}** | **{cost.ops_per_timestep:,}** |",
        f"`model.safetensors` has {size:,} bytes.",
        "The model learned from `toy`",
    ):
        assert part in found, part
    assert "phrasebook" not in found


def facts_of(*overrides: str, dropped: int = 0, sets: tuple[SetScores, ...] = ()) -> CardFacts:
    info = {"name": "c", "fingerprint": "f" * 64, "pairs_read": 1200 + dropped, "pairs_kept": 1200}
    info |= {"dropped": {"blank": dropped, "max_words": 0}, "source_pieces": 9000, "target_pieces": 10000}
    config = compose_config(list(overrides))
    return CardFacts(config, info | {"vocabulary_size": 512}, "a" * 64, {70: -12.5}, list(sets), 1234)


def test_a_name_that_somebody_chose_is_never_markup() -> None:
    evil = "`|<img onerror=x>|\n\n# title\n- item `` ```\r[x](javascript:y) *b* \x1b]0;z\x07"
    scores = {f"BL|{evil}": {"score": 1.0, "signature": evil}}
    decoding = {"beam_size": 4, "alpha": 0.2, "beta": 0.2, "experts_per_token": 0}
    facts = facts_of("experiment=demo", sets=(SetScores(evil, 7, [70], scores, 2.0, decoding),))
    corpus = replace(facts.config.corpus, source="files", train=FilesConfig([evil], [evil], [evil]))
    corpus = replace(corpus, source_language=evil, target_language=f"{evil} ")
    # Only what is no name of a folder is refused for a run.
    name = "".join(each for each in evil if each.isprintable() and each != "/")
    config = replace(facts.config, corpus=corpus, run=RunConfig(name))
    info = facts.corpus | {"name": evil, "fingerprint": evil, "dropped": {evil: 3}}
    text = model_card(replace(facts, config=config, corpus=info))
    lines = text.splitlines()
    plain = model_card(facts_of("experiment=demo", sets=facts.sets)).splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == [line for line in plain if line.startswith("#")][1:]
    assert not any(line.startswith(("- item", "[x]", "<", "---")) for line in lines)
    assert text.isprintable() or not any(each != "\n" and not each.isprintable() for each in text)
    # Code is taken away first, as a reader of Markdown does: then no HTML, link or emphasis is left.
    prose = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text)
    assert not re.search(r"(?<!\\)[<`]", prose.replace("\\`", ""))
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)[|]", row)) for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("text", ["a", "a`b", "``", "`a", "a``b`c", " a  b ", "", "a\nb", "|"])
def test_code_comes_back_as_it_was(text: str) -> None:
    """By the rule of CommonMark: the fence is the first run of backticks, and ends at the next one as long."""
    found = code(text)
    fence = re.match("`+", found)
    assert fence
    inner = found[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    if inner.startswith(" ") and inner.endswith(" "):
        inner = inner[1:-1]
    assert inner == (" ".join(text.split()) or "?")


def test_files_go_along_by_their_names_alone(cli: Cli, copy: Path, tmp_path: Path) -> None:
    path = copy / "config.yaml"
    config = yaml.safe_load(path.read_text())
    secret = str(tmp_path / "secret")
    for split in ("train", "dev", "test"):
        config["corpus"][split] |= {"source": [f"{secret}/a.en"], "target": ["../x/a.de"], "pairs": ["~/b.tsv"]}
    config["corpus"]["root"] = config["corpus"]["directory"] = secret
    config["run"]["directory"] = secret
    for source, kept in ((f"{secret}/hub", "hub"), ("wmt/wmt14", "wmt/wmt14"), ("./some/hub", "hub")):
        config["corpus"]["source"] = source
        path.write_text(yaml.safe_dump(config))
        out = tmp_path / f"out-{len(source)}"
        assert cli("export", str(copy), str(out)) == 0, cli.err
        found = yaml.safe_load((out / "config.yaml").read_text())["corpus"]
        assert found["source"] == kept
        assert [found["train"][side] for side in ("source", "target", "pairs")] == [["a.en"], ["a.de"], ["b.tsv"]]
        assert not any("secret" in (out / name).read_text() for name in ("config.yaml", "README.md", "manifest.json"))


def test_cards_of_other_models() -> None:
    phrasebook = model_card(facts_of("experiment=demo"))
    assert "The phrasebook is a teaching corpus" in phrasebook
    assert "after step 70 of run `demo`, which was configured for 700 steps" in phrasebook
    dense = model_card(facts_of("experiment=demo", "model.moe.num_experts=0", dropped=34))
    assert "| experts | none |" in dense
    assert "nmt experts" not in dense
    assert "mixtures" not in dense
    assert "1,234 read, 1,200 kept, 34 dropped (one side blank 34)" in dense
    facts = facts_of("experiment=demo", dropped=34)
    held_out = model_card(replace(facts, corpus=facts.corpus | {"pairs_read": 5234}))
    assert "5,234 read, 1,200 kept, 4,000 held out, 34 dropped" in held_out
    groups = ("model.moe.gating=hierarchical", "model.moe.branching=64", "model.moe.k=1")
    hub = model_card(facts_of("experiment=wmt14_en_fr_moe_2048", "training.best_by=bleu", *groups))
    assert "`wmt/wmt14`, `fr-en` (a data set of the Hugging Face hub" in hub
    assert "greedy BLEU 12.50 at step 70" in hub
    assert "two levels of noisy top-k (appendix B of the paper): 2 of 64 groups, 1 expert in each" in hub


@pytest.mark.parametrize("name", ["wmt14_en_de_s17", "wmt14_en_de_gnmt", "multi30k_en_de_moe_32", "demo"])
def test_every_table_has_a_cell_in_each_column(name: str) -> None:
    scores = {"BLEU": {"score": 1.0, "signature": "nrefs:1|case:mixed"}}
    decoding = {"beam_size": 4, "alpha": 0.2, "beta": 0.2, "experts_per_token": 1}
    one = SetScores("a|b", 7, [70], scores, 2.0, decoding)
    lines = model_card(facts_of(f"experiment={name}", sets=(one,))).splitlines()
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [table.strip().splitlines() for table in tables if table.strip()]
    assert len(tables) == 4
    for table in tables:
        assert len({row.replace("\\|", "").count("|") for row in table}) == 1, table
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
