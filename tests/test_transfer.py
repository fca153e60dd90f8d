"""A new run that starts with the parameters of another one: what is taken, by piece and by name, and what is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmt.checkpoint import list_checkpoints
from nmt.config import Config, ModelConfig
from nmt.data.subwords import RESERVED, Subwords
from nmt.data.symbols import Symbols
from nmt.model.names import PIECE_ROWS, Part, is_expert, summary
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import make_model
from nmt.parallel.mesh import World
from nmt.parameters import read_tensors
from nmt.preparation.prepare import prepare
from nmt.run import RunDirectory
from nmt.training.transfer import Origin, PieceRows, start_from
from tests.processes import run_ranks
from tests.toy import Cli, saved, settings, toy_config, train, write_corpus

CPU = torch.device("cpu")
Configs = Callable[..., ModelConfig]
NO_SYMBOLS = Symbols()
UNTIED = ("model.tie_embeddings=false",)


def other_text(folder: Path) -> Path:
    """The toy corpus with some other words, so that its vocabulary differs."""
    write_corpus(folder, seed=5)
    for path in folder.glob("*.*"):
        text = path.read_text().replace("meadow", "window").replace("Wiese", "Wände").replace("small", "smallest")
        path.write_text(text)
    return folder


def parameters(run: Path) -> dict[str, Tensor]:
    return read_tensors(list_checkpoints(run / "checkpoints")[-1].path / "model")


def started(
    config: Config, origin: Path, world: World | None = None, symbols: Symbols = NO_SYMBOLS
) -> tuple[Seq2Seq, Seq2Seq, list[str], Subwords]:
    """A model started from the run at `origin`, the same without that, what is said, and the vocabulary."""
    world = world or World(CPU)
    prepared = prepare(config.corpus, lambda _: None)
    subwords = prepared.subwords()
    models = []
    for _ in range(2):
        torch.manual_seed(config.training.seed)
        models.append(make_model(config, subwords.size, world))
    config.run.start_from = str(origin)
    found = Origin.find(config, RunDirectory(Path(config.run.directory) / config.run.name))
    lines = start_from(models[0], found, config, subwords, symbols, world)
    return models[0], models[1], lines, subwords


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `moe`, whose best checkpoint is not its last, and a run `dense`, on the toy text."""
    folder = tmp_path_factory.mktemp("transfer")
    write_corpus(folder)
    train(folder, "moe", 4, "training.validate_every=2")
    train(folder, "dense", 2, "model.moe.num_experts=0")
    train(folder, "untied", 2, *UNTIED)
    return folder


# ------------------------------------------------------------------------------------------------ pieces


@pytest.fixture(scope="module")
def vocabularies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subwords, Subwords]:
    """Those of the toy text and of the other text."""
    other = other_text(tmp_path_factory.mktemp("other"))
    return tuple(prepare(toy_config(each).corpus, lambda _: None).subwords() for each in (folder, other))


def test_pieces_keep_their_rows_or_start_with_the_mean_of_their_parts(vocabularies: tuple[Subwords, Subwords]) -> None:
    old, new = vocabularies
    rows = PieceRows.match(old, new, NO_SYMBOLS, NO_SYMBOLS)
    old_UD = torch.randn(old.size, 5)
    parameter_VD = torch.full((new.size, 5), torch.nan)
    assert rows.fill(parameter_VD, old_UD) == new.size * 5
    old_pieces, new_pieces = old.pieces(range(old.size)), new.pieces(range(new.size))
    both = new_ones = 0
    for piece, row_D in zip(new_pieces, parameter_VD, strict=True):
        if piece in old_pieces:
            both += 1
            assert torch.equal(row_D, old_UD[old_pieces.index(piece)])
            continue
        new_ones += 1
        # Behind a character that the old vocabulary has not, whose three bytes end no piece of text.
        text = piece.replace("▁", " ")
        parts = old.encode(f"漢{text}").tolist()[4:]
        assert "".join(old.pieces(parts)) == piece
        assert len(parts) > 1
        torch.testing.assert_close(row_D, old_UD[parts].mean(0))
    assert both > 300
    assert new_ones > 5
    assert f"{both:,} in both, {new_ones:,} new from the mean of their parts" in rows.told
    bias_V = torch.zeros(new.size)
    assert rows.fill(bias_V, old_UD[:, 0]) == new.size
    torch.testing.assert_close(bias_V, parameter_VD[:, 0])


def test_a_piece_is_cut_as_it_stands_in_a_line(vocabularies: tuple[Subwords, Subwords]) -> None:
    old, _ = vocabularies
    for text in ("eadow", " meadow", " the", "Z漢", " ", "a small", "</s>", "<slot:1>"):
        found = old.encode_within(text)
        assert old.decode([old.symbol("slot", 0), *found]).strip() == text.strip()
        assert "".join(old.pieces(found)).startswith("▁") == text.startswith(" ")
    assert old.encode_within("") == []
    assert old.encode_within(" the") == old.encode("the").tolist()


def test_a_word_that_looks_like_a_symbol_is_text(vocabularies: tuple[Subwords, Subwords]) -> None:
    old, _ = vocabularies
    texts, pieces = old.texts(), old.pieces(range(old.size))
    assert [piece for piece, text in zip(pieces, texts, strict=True) if text is None] == pieces[: 4 + 68 + 256]
    assert all(text == piece.replace("▁", " ") for piece, text in zip(pieces[328:], texts[328:], strict=True))


# ------------------------------------------------------------------------------------------------ names


def test_every_parameter_has_a_part(tiny_config: Configs) -> None:
    config = tiny_config(tie_embeddings=False, encoder_moe_after=[1, 2], decoder_moe_after=[1], output_bias=True)
    parts = {name: Part.of(name) for name, _ in Seq2Seq(config, 13).named_parameters()}
    assert {part.kind for part in parts.values()} == {
        *("embeddings", "softmax", "lstms", "attention", "gates", "experts")
    }
    for name, part in parts.items():
        assert (part.kind in ("embeddings", "softmax")) == (name in PIECE_ROWS)
        assert (part.kind == "experts") == is_expert(name)
        for side in ("encoder", "decoder"):
            assert part.belongs_to(side) == (name.startswith(side) and "moe" not in name)
    assert parts["encoder.upper.0.lstm.weight_hh_l0"] == ("lstms", "encoder.2")
    lstms = "LSTMs of encoder.1, encoder.2, encoder.3, decoder.1, decoder.2"
    layers = "encoder.1, encoder.2, decoder.1"
    assert summary(parts) == f"embeddings and softmax and attention; {lstms}; gates and experts of {layers}"


# ------------------------------------------------------------------------------------------------ parameters


def test_the_same_network_takes_all_of_the_best_checkpoint(folder: Path) -> None:
    run = RunDirectory(folder / "moe")
    best = min(list_checkpoints(run.checkpoints), key=lambda each: each.score or 0.0)
    model, _, lines, _ = started(toy_config(folder, "run.name=new"), folder / "moe")
    there = read_tensors(best.path / "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, there[name])
    count = len(there)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert lines == [
        f"starting from {folder}/moe, step {best.step}: {count} of {count} tensors taken, {numbers:,} of {numbers:,} "
        "parameters; the same subwords"
    ]


@pytest.mark.parametrize(("origin", "experts"), [("moe", 0), ("dense", 4), ("moe", 8)])
def test_experts_stay_behind_or_are_new(folder: Path, origin: str, experts: int) -> None:
    config = toy_config(folder, "run.name=new", f"model.moe.num_experts={experts}")
    model, fresh, lines, _ = started(config, folder / origin)
    there, drawn = parameters(folder / origin), dict(fresh.named_parameters())
    taken = 0
    for name, parameter in model.named_parameters():
        fits = ".moe." not in name
        taken += fits
        assert torch.equal(parameter, there[name] if fits else drawn[name]), name
    assert f"{taken} of {len(drawn)} tensors taken" in lines[0]
    layers = "encoder.1, decoder.1"
    told = {
        ("moe", 0): f"; left behind: gates and experts of {layers}; other",
        ("dense", 4): f"; new: gates and experts of {layers}; other",
        ("moe", 8): f"; new, as the shape differs: gates and experts of {layers}; other",
    }
    assert f"{told[origin, experts]} model.*: moe.num_experts; the same subwords" in lines[0], lines


@pytest.mark.parametrize(("origin", "changes"), [("moe", UNTIED), ("untied", ()), ("untied", UNTIED), ("moe", ())])
def test_tied_and_untied_embeddings_with_another_vocabulary(
    folder: Path, tmp_path: Path, origin: str, changes: tuple[str, ...]
) -> None:
    model, _, lines, new = started(toy_config(other_text(tmp_path / "text"), "run.name=new", *changes), folder / origin)
    old = Subwords.load(folder / origin / "subwords.model")
    rows = PieceRows.match(old, new, NO_SYMBOLS, NO_SYMBOLS)
    there = parameters(folder / origin)
    tied = "source_embedding.weight" not in there
    names = [name for name, _ in model.named_parameters() if name in PIECE_ROWS]
    assert len(names) == (3 if changes else 1)
    for name in names:
        expected = torch.empty(new.size, 16)
        rows.fill(expected, there["target_embedding.weight" if tied else name])
        assert torch.equal(model.get_parameter(name), expected)
    assert lines[1] == rows.told
    assert ("left behind: embeddings and softmax" in lines[0]) == (not tied and not changes), lines
    assert "new:" not in lines[0]
    assert ("other model.*: tie_embeddings" in lines[0]) == (tied != (not changes))


def test_nothing_that_fits_is_an_error(folder: Path, cli: Cli) -> None:
    changes = ("run.name=misfit", f"run.start_from={folder}/moe", "model.hidden_size=8", "model.cell_size=24")
    changes += ("model.attention.size=8", "model.moe.hidden_sizes=[24]", "training.max_steps=1")
    cli.refuses(2, "train", *settings(folder, *changes), says=("no parameter of this network",), progress=True)


def test_languages_and_tags_match_by_meaning(vocabularies: tuple[Subwords, Subwords]) -> None:
    old, new = vocabularies

    def rows(ours: Symbols, theirs: Symbols) -> dict[str, list[int]]:
        """The old ids from which each symbol of the new vocabulary is made, by its kind."""
        matched = PieceRows.match(old, new, ours, theirs)
        ends = [0, *matched.ends_V.tolist()]
        found = [matched.old_ids[ends[each] : ends[each + 1]].tolist() for each in range(new.size)]
        return {kind: [old for each in new.reserved_ids(kind) for old in found[each] or [-1]] for kind in RESERVED}

    languages, tags = old.reserved_ids("language"), old.reserved_ids("tag")
    by_number = {kind: [*old.reserved_ids(kind)] for kind in RESERVED}
    assert rows(Symbols(), Symbols()) == by_number
    # Nothing is known of the other table: by number.
    assert rows(Symbols(("de", "fr"), ("bt",)), Symbols()) == by_number
    assert rows(Symbols(), Symbols(("de", "fr"), ("bt",))) == by_number
    found = rows(Symbols(("de", "fr", "es"), ("bt",)), Symbols(("fr", "en", "de"), ("news", "bt")))
    assert found["language"][:4] == [languages[1], -1, languages[0], languages[3]]
    assert found["tag"][:3] == [-1, tags[0], tags[2]]
    assert found["slot"] == by_number["slot"]


@pytest.mark.parametrize(
    ("before", "now", "moved"), [(("de", "fr"), ("fr", "de"), True), (("de",), ("de", "fr"), False)]
)
def test_the_same_subwords_with_other_meanings(
    folder: Path, tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...], moved: bool
) -> None:
    shutil.copytree(folder / "moe", tmp_path / "old")
    info = json.loads((tmp_path / "old" / "corpus.json").read_text())
    (tmp_path / "old" / "corpus.json").write_text(json.dumps(info | Symbols(before).to_dict()))
    model, _, lines, subwords = started(toy_config(folder, "run.name=new"), tmp_path / "old", symbols=Symbols(now))
    there = parameters(tmp_path / "old")["target_embedding.weight"]
    first, second, *_ = subwords.reserved_ids("language")
    order = [second, first] if moved else [first, second]
    assert torch.equal(model.get_parameter("target_embedding.weight")[[first, second]], there[order])
    assert lines[0].endswith("the same subwords") == (not moved), lines


# ------------------------------------------------------------------------------------------------ processes


def share_of_started(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of this process, two of which start from a run that one process trained; and what is said."""
    config = toy_config(folder, "run.name=new")
    world = World.start("cpu", config.parallel)
    model, _, lines, _ = started(config, folder / "moe", world)
    world.stop()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, lines


def test_two_processes_take_their_shares_of_the_experts(folder: Path, tmp_path: Path) -> None:
    whole, _, lines, _ = started(toy_config(folder, "run.name=new"), folder / "moe")
    (first, first_lines), (second, _) = run_ranks(2, tmp_path, share_of_started, folder)
    assert first_lines == lines
    for name, parameter in whole.named_parameters():
        if is_expert(name):
            assert torch.equal(torch.cat([first[name], second[name]]), parameter)
        else:
            assert torch.equal(first[name], parameter)
            assert torch.equal(second[name], parameter)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.slow
def test_a_run_starts_resumes_without_its_origin_and_remembers_it(folder: Path, tmp_path: Path, cli: Cli) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(folder / "moe", origin)
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for stop in stops:
            arguments = settings(folder, f"run.name={name}", f"run.start_from={origin}", f"training.max_steps={stop}")
            assert cli("train", *arguments) == 0, cli.err
            told = [line for line in cli.err.splitlines() if line.startswith("starting from")]
            assert len(told) == (stop == stops[0])
            if name == "parts":
                shutil.rmtree(origin, ignore_errors=True)
    assert saved(folder / "parts") == saved(folder / "whole")
    assert saved(folder / "parts") != saved(folder / "moe")
    state = list_checkpoints(folder / "parts" / "checkpoints")[-1].state()
    assert state["progress"]["step"] == 4
    record = json.loads((folder / "parts" / "corpus.json").read_text())["started_from"]
    assert record["name"] == "origin"
    assert record["steps"] == [4]
    assert record["fingerprint"] in {each.fingerprint for each in list_checkpoints(folder / "moe" / "checkpoints")}
    assert cli("train", str(folder / "parts"), "training.max_steps=5") == 0, cli.err
    assert json.loads((folder / "parts" / "corpus.json").read_text())["started_from"] == record
    assert cli("export", str(folder / "parts"), str(tmp_path / "export")) == 0, cli.err
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| started from | the parameters of `origin`, step 4 (checkpoint `{record['fingerprint']}`)" in card
    # Not what it started from any more.
    changed = settings(folder, "run.name=parts", f"run.start_from={folder}/dense", "training.max_steps=6")
    cli.refuses(4, "train", *changed, says=("run.start_from was", "now"))


def test_an_export_in_bf16_is_an_origin_too(folder: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("export", str(folder / "moe"), str(tmp_path / "small"), "--bf16") == 0, cli.err
    model, _, lines, _ = started(toy_config(folder, "run.name=new"), tmp_path / "small")
    whole, _, _, _ = started(toy_config(folder, "run.name=new"), folder / "moe")
    assert lines[0].startswith(f"starting from {tmp_path}/small, step ")
    rounded = 0
    for (name, parameter), (_, exact) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32
        rounded += not torch.equal(parameter, exact)
        torch.testing.assert_close(parameter, exact, rtol=1e-2, atol=1e-6, msg=name)
    assert rounded


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_cannot_start_from_itself(folder: Path, cli: Cli, exists: bool) -> None:
    name = "itself" if exists else "nobody"
    if exists:
        shutil.copytree(folder / "dense", folder / name)
        shutil.rmtree(folder / name / "checkpoints")
    arguments = settings(folder, f"run.name={name}", f"run.start_from={folder}/{name}", "model.moe.num_experts=0")
    status, says = (4, "run.start_from was , now") if exists else (2, "is the run itself")
    cli.refuses(status, "train", *arguments, "training.max_steps=2", says=(says,))


def test_an_origin_that_is_missing_or_damaged_is_refused_before_a_run_is_made(folder: Path, cli: Cli) -> None:
    arguments = settings(folder, "run.name=lost", f"run.start_from={folder}/gone", "training.max_steps=2")
    cli.refuses(4, "train", *arguments, says=("run.start_from=", "is not a run"))
    assert not (folder / "lost").exists()
    shutil.copytree(folder / "moe", folder / "hurt")
    for path in (folder / "hurt" / "checkpoints").rglob("model/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    hurt = settings(folder, "run.name=lost", f"run.start_from={folder}/hurt", "training.max_steps=2")
    cli.refuses(4, "train", *hurt, says=("is damaged", "choose another run.start_from"), progress=True)
