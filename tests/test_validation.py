"""Validation: BLEU shared out over processes that need each other's experts, and what must not steer a run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nmt.training.validation
from nmt.checkpoint import list_checkpoints
from nmt.config import DecodingConfig, Direction, TrainingConfig
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.tokenizers import Tokenizer
from nmt.parallel.expert_parallel import independent_passes
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.validation import DevPart, doubts, validation_bleu
from tests.processes import run_ranks
from tests.test_parallel import CASES, VOCABULARY, config_of, trained_model
from tests.toy import Cli, settings, train, write_corpus

# Of very different lengths, so that no process ends when another does.
LENGTHS = [9, 1, 4, 2, 30, 1, 1, 6, 2]
GREEDY = DecodingConfig(beam_size=1, batch_tokens=32, precision="fp32", device="cpu")
OPTIONS = Options.of(GREEDY)
SENTENCES = ["a b c d e f", "b c d e f g", "the dog runs over a meadow", "d", "e f g h i", "x y z u v w"]


def sources() -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(NUM_SPECIAL, VOCABULARY, size=length) for length in LENGTHS]


def translations(
    case: str, share: slice, disturb: bool = False, halves: bool = False, precision: str = "fp32"
) -> list[torch.Tensor]:
    """What this process finds for its share of the sentences."""
    config = config_of(case, 1, training=False, parallel={"overlap_exchange": halves})
    world = World.start("cpu", config.parallel)
    model = trained_model(config, world).eval()
    model = model.float() if precision == "bf16" else model
    if disturb and world.rank:
        # As another kind of GPU would, only more so.
        with torch.no_grad():
            for parameter in model.decoder.upper.parameters():
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
    subwords: Any = SimpleNamespace(forbidden_ids=(0, 1, 2), reserved_ids=lambda kind: range(0))
    translator = Translator(model, subwords, replace(GREEDY, precision=precision), world.device)
    with independent_passes(translator.model):
        found = translator.searcher.search(sources()[share], translator.options)
    return [torch.tensor(best.tokens) for (best,) in found]


def echo(texts: list[str], _options: Any = None) -> list[Any]:
    """A translator that spoils some sentences."""
    return [SimpleNamespace(text=text.replace("dog", "cat").replace("x", "y")) for text in texts]


def _two_ranks() -> dict[str, Any]:
    world = World.start("cpu", config_of("no experts", 1).parallel)
    rank, size = world.rank, world.size
    own = slice(rank, None, size)
    stub: Any = SimpleNamespace(model=SimpleNamespace(moe_layers=dict), translate=echo)
    return {
        "shared": {case: translations(case, own) for case in CASES},
        "halves": translations("noisy_top_k", own, halves=True),
        "one has none": translations("noisy_top_k", slice(0, 5 * (1 - rank))),
        "bf16": translations("noisy_top_k", slice(0, 5 * (1 - rank)), precision="bf16"),
        "other weights": len(translations("noisy_top_k", own, disturb=True)),
        "bleu": validation_bleu(stub, SENTENCES, SENTENCES, "13a", world, OPTIONS),
        "fewer sentences": validation_bleu(stub, SENTENCES[:1], SENTENCES[:1], "13a", world, OPTIONS),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("two"), _two_ranks)


def assert_same(found: list[list[torch.Tensor]], expected: list[torch.Tensor]) -> None:
    joined: list[Any] = [None] * len(expected)
    for rank, share in enumerate(found):
        joined[rank :: len(found)] = share
    assert [each.tolist() for each in joined] == [each.tolist() for each in expected]
    assert len({tuple(each.tolist()) for each in expected}) > 1


@pytest.mark.parametrize("case", CASES)
def test_sentences_shared_out_are_translated_as_by_one_process(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["shared"][case] for result in two_ranks], translations(case, slice(None)))


def test_tokens_that_travel_in_halves(two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["halves"] for result in two_ranks], translations("noisy_top_k", slice(None)))


def test_a_process_without_sentences_serves_the_others(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (result["one has none"] for result in two_ranks)
    assert second == []
    assert_same([first], translations("noisy_top_k", slice(0, 5)))


def test_products_in_bf16(two_ranks: list[dict[str, Any]]) -> None:
    """What a process sends without tokens has the type of what the others send."""
    first, second = (result["bf16"] for result in two_ranks)
    assert (len(first), len(second)) == (5, 0)


def test_processes_that_compute_otherwise_do_not_wait_for_each_other_for_ever(two_ranks: list[dict[str, Any]]) -> None:
    """They end their sentences at other places: that must not change who takes part in what."""
    assert [result["other weights"] for result in two_ranks] == [5, 4]


def test_bleu_is_that_of_all_sentences(two_ranks: list[dict[str, Any]]) -> None:
    for key, sentences in (("bleu", SENTENCES), ("fewer sentences", SENTENCES[:1])):
        expected = corpus_scores([each.text for each in echo(sentences)], [sentences], "13a")[0].value
        assert [result[key] for result in two_ranks] == [expected, expected]
    assert 1 < two_ranks[0]["bleu"] < 100


# ------------------------------------------------------------------------------------------- what steers a run

CHINESE = ["我们明天早上坐火车去北京。", "他昨天买了三本新书。"]
BY_BLEU = TrainingConfig(best_by="bleu")


def part_of(tokenizer: Tokenizer, targets: list[str], translated: int = 500) -> list[DevPart]:
    return [DevPart(Direction("en", "zh"), targets, targets, min(translated, len(targets)), tokenizer)]


def test_a_bleu_that_means_nothing_never_steers() -> None:
    blind, fitting = Tokenizer("13a", "by evaluation.tokenize"), Tokenizer("zh", "the target language is zh")
    with pytest.raises(UserError, match=r"training.best_by=bleu: BLEU with tokeniser 13a means .*tokenize=zh, or"):
        doubts(BY_BLEU, part_of(blind, CHINESE))
    assert "means nothing" in doubts(TrainingConfig(), part_of(blind, CHINESE))[0]
    assert doubts(TrainingConfig(validation_sentences=0), part_of(blind, CHINESE, 0)) == []
    assert doubts(BY_BLEU, part_of(fitting, CHINESE)) == ["BLEU tokeniser zh: the target language is zh"]
    assert doubts(BY_BLEU, part_of(blind, ["ein Hund"])) == []
    both = [*part_of(fitting, CHINESE), *part_of(blind, ["ein Hund"]), *part_of(fitting, CHINESE)]
    assert doubts(BY_BLEU, both) == ["BLEU tokeniser zh: the target language is zh"]


def test_a_blank_dev_set_is_told() -> None:
    blank = Tokenizer("13a", "")
    (line,) = doubts(BY_BLEU, part_of(blank, ["", "  ", "\t"]))
    assert "blank" in line
    assert doubts(BY_BLEU, part_of(blank, ["", "ein Hund"])) == []
    assert doubts(BY_BLEU, [*part_of(blank, ["", " "]), *part_of(blank, ["ein Hund"])]) == []


@pytest.mark.slow
def test_a_run_that_bleu_cannot_steer_is_refused_before_it_starts(cli: Cli, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "dev.de").write_text((CHINESE[0] + "\n") * 8)
    changes = ("run.name=a", "training.max_steps=2", "training.best_by=bleu")
    cli.refuses(2, "train", *settings(tmp_path, *changes), says=("training.best_by=bleu", "zh"), progress=True)
    assert cli("train", *settings(tmp_path, *changes, "run.name=b", "training.best_by=perplexity")) == 0
    assert "validation: BLEU with tokeniser 13a means nothing" in cli.err
    arguments = settings(tmp_path, *changes, "run.name=c", "evaluation.tokenize=zh")
    assert cli("train", *arguments) == 0, cli.err
    assert "validation: BLEU tokeniser zh: by evaluation.tokenize" in cli.err
    # What chose the best so far cannot be changed on the way.
    says = ("evaluation.tokenize was zh, now char",)
    cli.refuses(4, "train", *arguments, "evaluation.tokenize=char", says=says, progress=True)


def test_too_low_a_bleu_chooses_nothing_and_costs_no_patience(
    capfd: pytest.CaptureFixture[str], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter([0.0, 0.4, 0.9, 3.0, 0.2, 2.0, 2.5])
    monkeypatch.setattr(nmt.training.validation, "validation_bleu", lambda *_: next(coming))
    changes = ("training.validate_every=1", "training.patience=2", "training.best_by=bleu")
    run = train(corpus, "a", 50, *changes, "training.checkpoint_every=1", "training.keep_checkpoints=99")
    scores = [each.score for each in list_checkpoints(run / "checkpoints")]
    assert scores == [None, None, None, -3.0, None, -2.0, -2.5]
    err = capfd.readouterr().err
    assert err.count("below BLEU 1, no checkpoint is best") == 4
    assert "(best so far)" in err
