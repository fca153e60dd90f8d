"""Word-level distillation: the loss, what is stored, what batches have of it, and the command."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nmt.batch import Batch, fit
from nmt.config import Direction, ModelConfig, TrainingConfig
from nmt.data.batching import BatchStream
from nmt.data.held_out import HeldOut
from nmt.data.mixture import Mixture
from nmt.data.prepared import Part, Prepared
from nmt.data.shards import (
    DTYPES,
    MANIFEST,
    TEACHER_BEST,
    ParallelShards,
    ShardWriter,
    file_record,
    teacher_dtype,
)
from nmt.decoding.scoring import best_subwords, pair_log_probs
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.model import loss as loss_module
from nmt.model.kernels import cross_entropy
from nmt.model.kernels.cross_entropy import plain_softmax_gradient, taught_softmax_gradient
from nmt.model.loss import Lesson, SoftmaxInput, linear_cross_entropy, taught_cross_entropy, top_probabilities
from nmt.model.seq2seq import Seq2Seq
from nmt.run import RunDirectory
from nmt.students.teacher import Taught, Teacher
from nmt.tokens import EOS
from tests.conftest import TINY_VOCAB
from tests.lessons import with_teacher
from tests.toy import Cli, saved, settings, train

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]

TOKENS, WIDTH, VOCAB, KNOWN = 13, 5, 11, 4
STUDENT = ("run.name=student", "training.max_steps=6", "model.moe.num_experts=0")


# ------------------------------------------------------------------------------------------------------ the loss


def problem(bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The softmax's input, weight and bias, if any; targets; a teacher's outputs, and 0 for some tokens."""
    sizes = [(TOKENS, WIDTH), (VOCAB, WIDTH), *([(VOCAB,)] if bias else [])]
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes]
    ids_NK = torch.rand(TOKENS, VOCAB).argsort(1)[:, :KNOWN]
    probability_NK = torch.rand(TOKENS, KNOWN, dtype=torch.float64)
    probability_NK[::3] = 0.0
    target_N = torch.randint(VOCAB, (TOKENS,))
    target_N[1] = ids_NK[1, 2]
    return leaves, target_N, ids_NK, probability_NK


def losses(leaves: list[Tensor], target_N: Tensor, smoothing: float, *rest: Any) -> tuple[Tensor, Tensor]:
    return taught_cross_entropy(*leaves[:2], leaves[2] if len(leaves) > 2 else None, target_N, smoothing, *rest)


def oracle(leaves: list[Tensor], target_N: Tensor, smoothing: float, lesson: Lesson) -> Tensor:
    """The loss by operations that autograd knows, on the whole distribution."""
    logits_NV = F.linear(*leaves)
    mass_N = lesson.probability_NK.sum(1)
    said_N = mass_N > 0
    p_NV = torch.zeros_like(logits_NV).scatter(1, lesson.ids_NK, lesson.probability_NK.to(logits_NV.dtype))
    p_NV = p_NV / mass_N.where(said_N, 1.0)[:, None]
    own_N = F.cross_entropy(logits_NV, target_N, label_smoothing=smoothing, reduction="none")
    taught_N = F.cross_entropy(logits_NV, p_NV, reduction="none")
    weight_N = lesson.weight * said_N
    return ((1 - weight_N) * own_N + weight_N * taught_N).sum()


@pytest.mark.parametrize("piece_tokens", [1, 8, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.5), (0.1, 0.3), (0.7, 1.0)])
def test_values_and_gradients_equal_torch_s(
    smoothing: float, weight: float, bias: bool, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_PIECE_ELEMENTS", piece_tokens * VOCAB)
    leaves, target_N, *said = problem(bias)
    lesson = Lesson(*said, weight)
    loss, nll = losses(leaves, target_N, smoothing, lesson)
    expected = oracle(leaves, target_N, smoothing, lesson)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, F.cross_entropy(F.linear(*leaves), target_N, reduction="sum"))
    assert not nll.requires_grad
    # The factor stands for what follows the loss: division by the number of tokens.
    gradients = torch.autograd.grad(0.37 * loss, leaves)
    for gradient, each in zip(gradients, torch.autograd.grad(0.37 * expected, leaves), strict=True):
        torch.testing.assert_close(gradient, each)


def test_tokens_without_a_teacher_have_their_own_loss_to_the_bit() -> None:
    leaves, target_N, ids_NK, probability_NK = problem()
    for smoothing in (0.0, 0.1):
        found = losses(leaves, target_N, smoothing, Lesson(torch.zeros_like(ids_NK), probability_NK * 0, 0.5))
        plain = linear_cross_entropy(*leaves, target_N, smoothing)
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        both = (torch.autograd.grad(each[0], leaves) for each in (found, plain))
        assert all(map(torch.equal, *both))


def test_padding_has_no_part() -> None:
    leaves, target_N, *said = problem()
    real_N = torch.rand(TOKENS) < 0.6
    found = losses(leaves, target_N, 0.1, Lesson(*said, 0.5), real_N)
    own = [leaves[0][real_N], *leaves[1:]]
    expected = losses(own, target_N[real_N], 0.1, Lesson(*(each[real_N] for each in said), 0.5))
    torch.testing.assert_close(found, expected)
    both = (torch.autograd.grad(each[0], leaves) for each in (found, expected))
    for gradient, each in zip(*both, strict=True):
        torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_is_right_when_the_others_are_not_wanted(wanted: int) -> None:
    leaves, target_N, *said = problem()
    inputs = [leaf.detach() for leaf in leaves]
    inputs[wanted].requires_grad_()
    lesson = Lesson(*said, 0.5)
    (gradient,) = torch.autograd.grad(losses(inputs, target_N, 0.1, lesson)[0], inputs[wanted])
    expected = oracle(inputs, target_N, 0.1, lesson)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, inputs[wanted])[0])


def test_without_gradients_only_the_logits_are_computed() -> None:
    leaves, target_N, *said = problem()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        losses(leaves, target_N, 0.1, Lesson(*said, 0.5))
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCAB


def test_half_precision_has_a_float32_loss() -> None:
    leaves, target_N, *said = problem()
    halves = [leaves[0].detach().bfloat16(), *(leaf.detach().float() for leaf in leaves[1:])]
    for each in halves:
        each.requires_grad_()
    lesson = Lesson(said[0], said[1].float(), 0.5)
    loss, nll = losses(halves, target_N, 0.1, lesson)
    assert loss.dtype == nll.dtype == torch.float32
    expected = oracle([each.float() for each in halves], target_N, 0.1, lesson)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
    gradients = torch.autograd.grad(loss, halves)
    assert [gradient.dtype for gradient in gradients] == [each.dtype for each in halves]
    for gradient, each in zip(gradients, torch.autograd.grad(expected, halves), strict=True):
        torch.testing.assert_close(gradient.float(), each.float(), rtol=0.05, atol=0.1)


def test_a_gradient_that_overwrites_the_logits_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fused one does on a GPU."""
    leaves, target_N, *said = problem()
    logits_NV = F.linear(*leaves).detach()
    expected = taught_softmax_gradient(logits_NV.clone(), target_N, 0.1, *said, 0.5)

    def overwriting(logits_MV: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        nll_M, uniform_M, gradient_MV = plain_softmax_gradient(logits_MV, *rest)
        return nll_M, uniform_M, logits_MV.copy_(gradient_MV)

    monkeypatch.setattr(cross_entropy, "softmax_gradient", overwriting)
    assert all(map(torch.equal, taught_softmax_gradient(logits_NV, target_N, 0.1, *said, 0.5), expected))


# --------------------------------------------------------------------------------------------------- the network


def test_rows_of_padding_have_no_part_in_the_loss(tiny_config: Configs, tiny_batch: Batches) -> None:
    model = Seq2Seq(tiny_config(), TINY_VOCAB).double().eval()
    batch = with_teacher(tiny_batch((4, 2), (1, 6), (3, 3)), TINY_VOCAB)
    fitted = fit(batch, batch.shape.with_room(2))
    outputs = [model(each, 0.1, teacher_weight=0.5) for each in (batch, fitted)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    gradients = [torch.autograd.grad(each.loss, list(model.parameters()), allow_unused=True) for each in outputs]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert fitted.teacher_NK is not None
    assert fitted.target.real_N is not None
    assert not fitted.teacher_NK[~fitted.target.real_N].any()


def test_at_weight_0_and_without_a_teacher_the_loss_is_that_of_the_targets(
    tiny_config: Configs, tiny_batch: Batches
) -> None:
    model, plain = Seq2Seq(tiny_config(), TINY_VOCAB).eval(), tiny_batch((4, 2), (1, 6))
    batch = with_teacher(plain, TINY_VOCAB)
    expected = model(plain, 0.1).loss
    assert torch.equal(model(batch, 0.1).loss, expected)
    assert torch.equal(model(plain, 0.1, teacher_weight=0.5).loss, expected)
    taught = model(batch, 0.1, teacher_weight=0.5)
    assert not torch.isclose(taught.loss, expected)
    torch.testing.assert_close(taught.nll, model(plain, 0.1).nll)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_weights_that_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^training\.teacher_weight={value} must be at"):
        TrainingConfig(teacher_weight=value)


# ---------------------------------------------------------------------------------------------- what is most probable


@pytest.mark.parametrize("piece_tokens", [1, 8, 10**6])
def test_the_most_probable_subwords_of_several_models(piece_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_PIECE_ELEMENTS", piece_tokens * VOCAB)
    inputs = [SoftmaxInput(*(leaf.detach() for leaf in problem()[0])) for _ in range(3)]
    mean_NV = sum(F.linear(*each).softmax(1) for each in inputs) / 3
    ids_NK, probability_NK = top_probabilities(inputs, KNOWN)
    torch.testing.assert_close(probability_NK, mean_NV.sort(1, descending=True)[0][:, :KNOWN])
    torch.testing.assert_close(probability_NK, mean_NV.gather(1, ids_NK))


def test_positions_are_those_of_forced_decoding(run: Path) -> None:
    """Of the whole distribution, the probability of each target's subword is the one that forced decoding gives."""
    directory = RunDirectory(run)
    translator = Translator.load(directory, directory.config())
    models, count = translator.models * 2, translator.subwords.size
    generator = np.random.default_rng(1)
    sides = [[generator.integers(10, 60, size=size) for size in generator.integers(0, 9, 40)] for _ in range(2)]
    held_out = HeldOut(*sides, [])
    found = best_subwords(models, held_out, count)
    for target, log_probs, (ids_TK, p_TK) in zip(sides[1], pair_log_probs(models, held_out), found, strict=True):
        assert ids_TK.shape == p_TK.shape == (len(target) + 1, count)
        assert (np.diff(p_TK, axis=1) <= 0).all()
        wanted_TK = ids_TK == np.append(target, EOS)[:, None]
        np.testing.assert_allclose(p_TK[wanted_TK], np.exp(log_probs), rtol=1e-4)
    assert best_subwords(models, HeldOut([], [], []), 3) == []


# ------------------------------------------------------------------------------------------------------- on disk


def rows_for(targets: list[np.ndarray]) -> np.ndarray:
    """Rows whose first subword is the target itself, with a probability that tells its position apart."""
    wanted_N = np.concatenate([np.append(target, EOS) for target in targets])
    rows_N = np.zeros(len(wanted_N), dtype=teacher_dtype(DTYPES[0]))
    rows_N["ids"] = (wanted_N[:, None] + np.arange(TEACHER_BEST)) % 60
    rows_N["probabilities"][:, 0] = 1 / (2 + np.arange(len(wanted_N)))
    return rows_N


def write_taught(folder: Path, targets: list[np.ndarray], rows_N: np.ndarray) -> None:
    with ShardWriter(folder, 60, taught=True) as writer:
        half, cut = len(targets) // 2, sum(len(target) + 1 for target in targets[: len(targets) // 2])
        writer.append(targets[:half], targets[:half], rows_N[:cut])
        writer.append([], [], rows_N[:0])
        writer.append(targets[half:], targets[half:], rows_N[cut:])
    (folder / MANIFEST).write_text(json.dumps({"shards": {"train": writer.record()}}))


@pytest.fixture
def targets() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(4, 60, size=size) for size in (3, 0, 5, 1, 4, 4)]


def test_rows_are_read_as_they_were_written(tmp_path: Path, targets: list[np.ndarray]) -> None:
    rows_N = rows_for(targets)
    write_taught(tmp_path, targets, rows_N)
    assert (tmp_path / "train.teacher").stat().st_size == 32 * (sum(map(len, targets)) + len(targets))
    shards = ParallelShards.open(tmp_path)
    shards.check_pieces(60)
    begins = np.cumsum([0, *(len(target) + 1 for target in targets)])
    found = shards.teacher(np.array([4, 1, 4, 2]))
    assert found is not None
    expected = np.concatenate([rows_N[begins[pair] : begins[pair + 1]] for pair in (4, 1, 4, 2)])
    assert np.array_equal(found, expected)
    assert shards.swapped().teacher(np.array([0])) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("ids", 60, "outside 0..59"), ("probabilities", np.nan, "outside 0..1"), ("probabilities", 1.5, "outside 0..1")],
)
def test_rows_that_no_teacher_gives_are_refused(
    tmp_path: Path, targets: list[np.ndarray], field: str, value: float, message: str
) -> None:
    rows_N = rows_for(targets)
    rows_N[field][7, 3] = value
    write_taught(tmp_path, targets, rows_N)
    with pytest.raises(DataError, match=message):
        ParallelShards.open(tmp_path).check_pieces(60)


def test_rows_for_other_targets_are_refused(tmp_path: Path, targets: list[np.ndarray]) -> None:
    write_taught(tmp_path, targets, rows_for(targets))
    path = tmp_path / "train.teacher"
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(DataError, match="has 704 bytes instead of"):
        ParallelShards.open(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["shards"]["train"]["files"]["train.teacher"] = file_record(path)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="has 22 rows for 23 target positions"):
        ParallelShards.open(tmp_path)


# --------------------------------------------------------------------------------------------------- in batches


def part_of(name: str, seed: int, taught: bool, prefix: tuple[int, ...] = ()) -> Part:
    """A part of 30 pairs; subwords below 30 are in those without a teacher only."""
    generator = np.random.default_rng(seed)
    low, high = (30, 60) if taught else (4, 30)
    sides = [[generator.integers(low, high, size=size) for size in generator.integers(0, 7, 30)] for _ in range(2)]
    names = ("source", "target")
    pieces = {side: np.concatenate(each) for side, each in zip(names, sides, strict=True)}
    offsets = {side: np.cumsum([0, *map(len, each)]) for side, each in zip(names, sides, strict=True)}
    rows_N = rows_for(sides[1]) if taught else None
    return Part(name, Direction("en", "de"), "", ParallelShards(pieces, offsets, rows_N), prefix)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("prefix", [(), (7, 8)])
def test_each_target_of_a_batch_has_its_row(fitted: bool, prefix: tuple[int, ...]) -> None:
    """In a mixture, those of corpora without a teacher have none."""
    parts = [part_of("taught", 1, True, prefix), part_of("own", 2, False, prefix), part_of("more", 3, True, prefix)]
    training = TrainingConfig(batch_tokens=90, micro_batches=2)
    with BatchStream(Mixture(parts, [1.0, 2.0, 1.0], seed=1), training, fitted=fitted) as stream:
        batches = [batch for step in islice(stream, 5) for batch in step]
    counts = np.zeros(2, dtype=int)
    for batch in batches:
        assert batch.teacher_ids_NK is not None
        assert batch.teacher_NK is not None
        assert batch.teacher_NK.dtype == torch.float32
        taught_N = batch.teacher_NK.sum(1) > 0
        assert torch.equal(batch.teacher_ids_NK[taught_N, 0], batch.target_out_N[taught_N])
        real_N = torch.ones_like(taught_N) if batch.target.real_N is None else batch.target.real_N
        assert not taught_N[~real_N].any()
        piece_N = real_N & (batch.target_out_N != EOS)
        assert torch.equal(taught_N[piece_N], batch.target_out_N[piece_N] >= 30)
        assert not batch.teacher_NK[~taught_N].any()
        counts += [int(taught_N.sum()), int((real_N & ~taught_N).sum())]
    assert counts.min() > 50


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_without_a_teacher_has_batches_without_one(count: int) -> None:
    parts = [part_of("own", 2 + number, False) for number in range(count)]
    with BatchStream(Mixture(parts, [1.0] * count, seed=1), TrainingConfig(batch_tokens=90), fitted=True) as stream:
        [batch] = next(stream)
    assert batch.teacher_ids_NK is batch.teacher_NK is None


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def own(shared_text: Path, tmp_path: Path) -> Path:
    """A folder for runs and prepared text, with text that other tests do not see."""
    for path in shared_text.glob("*.??"):
        shutil.copy(path, tmp_path)
    return tmp_path


def arguments(run: Path, folder: Path, *changes: str) -> list[str]:
    return ["distill", str(run), *settings(folder, *STUDENT), "decoding.beam_size=2", "--word-level", *changes]


def taught_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "p").glob("toy-taught-*") if path.suffix != ".parts")


@pytest.mark.slow
def test_what_is_stored_are_the_teacher_s_probabilities_of_all_targets(cli: Cli, shared_text: Path, own: Path) -> None:
    # It has learned to end its translations, so that there are new targets and references.
    rare = [f"training.{name}=1000" for name in ("validate_every", "checkpoint_every", "log_every")]
    run = train(shared_text, "word-level-teacher", 60, "training.learning_rate=0.02", *rare)
    assert cli(*arguments(run, own, "--only-text")) == 0, cli.err
    assert "the 8 most probable subwords at each target position need about" in cli.err
    prepared = Prepared.open(*taught_in(own))
    prepared.verify()
    assert prepared.manifest["taught"]["word_level"] == 8
    shards = prepared.parts()[0].shards
    assert 0 < sum(prepared.manifest["taught"]["kept"].values()) < len(shards)
    directory = RunDirectory(run)
    pairs = range(len(shards))
    held_out = HeldOut([shards.source(pair) for pair in pairs], [shards.target(pair) for pair in pairs], [])
    found = best_subwords(Translator.load(directory, directory.config()).models, held_out, TEACHER_BEST)
    rows_N = shards.teacher(np.arange(len(shards)))
    assert rows_N is not None
    expected = np.concatenate([p_TK for _, p_TK in found])
    readable_N = rows_N["probabilities"].any(1)
    assert readable_N.mean() > 0.9
    np.testing.assert_allclose(rows_N["probabilities"][readable_N], expected[readable_N], rtol=2e-3, atol=1e-6)
    assert (rows_N["ids"] == np.concatenate([ids_TK for ids_TK, _ in found]))[readable_N].mean() > 0.99


@pytest.mark.slow
def test_the_student_learns_from_them_and_resumes_to_the_bit(cli: Cli, run: Path, own: Path) -> None:
    hard = ("training.micro_batches=2", "training.batch_tokens=400", "model.word_dropout=0.1")
    command = arguments(run, own, *hard)
    assert cli(*command) == 0, cli.err
    whole = saved(own / "student")
    [taught] = taught_in(own)
    shutil.rmtree(own / "student")
    first = [word.replace("max_steps=6", "max_steps=3") for word in command]
    assert cli(*first) == 0, cli.err
    assert cli(*command) == 0, cli.err
    assert "resuming from" in cli.err
    assert saved(own / "student") == whole
    mixture = f"corpus.mixture={{{taught}: 1}}"
    # At weight 0, the student is that of the text alone, whose probabilities R-Drop may leave out.
    unweighted = [*settings(own, *STUDENT, *hard), "run.name=unweighted", "training.teacher_weight=0"]
    assert cli("train", *unweighted, mixture) == 0, cli.err
    assert saved(own / "unweighted")["model"] != whole["model"]
    words = [word for word in command if word != "--word-level"]
    assert cli(*words, "run.name=sequence") == 0, cli.err
    assert len(taught_in(own)) == 2
    assert saved(own / "sequence") == saved(own / "unweighted")


@pytest.mark.slow
def test_after_a_kill_the_rest_is_made_and_all_is_the_same(
    cli: Cli, run: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(run, own, "--only-text")
    assert cli(*command) == 0, cli.err
    [path] = taught_in(own)
    whole = {each.name: each.read_bytes() for each in path.iterdir()}
    shutil.rmtree(path)
    teach, calls = Teacher.teach, []

    def killed(*given: Any) -> Taught:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return teach(*given)

    monkeypatch.setattr(Teacher, "teach", killed)
    assert cli(*command) == 130
    parts = path.with_name(f"{path.name}.parts")
    assert len(list(parts.glob("*.npy"))) == 2
    # Rows without the file that ends a part are made again, and so are those that were removed.
    (parts / "part-00002.npy").write_bytes(b"half")
    (parts / "part-00001.npy").unlink()
    cli.refuses(3, *command, says=("part-00001.json is damaged", "remove it"), progress=True)
    (parts / "part-00001.json").unlink()
    assert cli(*command) == 0, cli.err
    assert {each.name: each.read_bytes() for each in path.iterdir()} == whole


def test_a_teacher_of_another_vocabulary_is_refused(cli: Cli, run: Path, own: Path) -> None:
    says = ("--word-level needs a teacher with the student's vocabulary", f"corpus.subwords.vocabulary={run}")
    cli.refuses(2, *arguments(run, own, "corpus.subwords.vocab_size=72"), says=says, progress=True)
    assert taught_in(own) == []


@pytest.mark.slow
def test_sampled_subwords_and_r_drop_are_refused(cli: Cli, run: Path, own: Path) -> None:
    for key in ("corpus.subwords.sampling", "training.r_drop"):
        says = (f"which {key}=0.5 cannot use", f"set {key}=0", "training.teacher_weight=0")
        cli.refuses(2, *arguments(run, own, f"{key}=0.5"), says=says, progress=True)
    assert taught_in(own) == []
    assert cli(*arguments(run, own, "--only-text")) == 0, cli.err
    [taught] = taught_in(own)
    words = [*settings(own, *STUDENT), f"corpus.mixture={{{taught}: 1}}", "training.r_drop=0.5"]
    cli.refuses(2, "train", *words, says=(f"{taught} has", "which training.r_drop=0.5"), progress=True)
    assert not (own / "student").exists()
    assert cli("train", *words, "training.teacher_weight=0") == 0, cli.err


def test_a_source_that_the_teacher_cannot_read_has_no_probabilities(run: Path) -> None:
    directory = RunDirectory(run)
    teacher = Teacher(directory, directory.config(), "best")
    subwords = teacher.translator.subwords
    dog, slot = subwords.encode("the dog"), np.array([subwords.symbol("slot", 1)], dtype=np.int32)
    sources = [np.concatenate([dog, slot]), dog, dog[:0]]
    targets = [dog, dog[:1], dog]
    rows_N = teacher.probabilities(sources, targets, subwords, Direction("en", "de"))
    assert rows_N["probabilities"].any(1).tolist() == [False] * (len(dog) + 1) + [True] * 2 + [False] * (len(dog) + 1)
    assert len(set(rows_N["ids"][len(dog) + 1].tolist())) == TEACHER_BEST
