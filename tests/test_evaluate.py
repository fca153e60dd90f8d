"""nmt evaluate: which text is scored, by which tokeniser, and where the result is kept."""

import gzip
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nmt.evaluation.tokenizers
from nmt.checkpoint import list_checkpoints
from nmt.commands.keep import keep
from nmt.config import Config, EvaluationConfig
from nmt.data import held_out
from nmt.data.held_out import describe_cut, encode_pairs, eval_batches
from nmt.decoding.loading import load_vocabulary
from nmt.errors import MemoryLimitError, UserError
from nmt.evaluation.perplexity import perplexity
from nmt.evaluation.scores import all_scores, corpus_scores
from nmt.evaluation.tokenizers import bleu_tokenizer, misfit
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from tests.toy import Cli

CHINESE = ["我们明天早上坐火车去北京。", "他昨天买了三本新书。", "请问洗手间在哪里？", "今天的天气非常好，适合出去玩。"]


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that nobody has evaluated."""
    path = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(path / "report", ignore_errors=True)
    return path


def columns(out: str) -> list[str]:
    """The first row of the table, without the name of the set and the speed."""
    return out.splitlines()[1].split()[1:-1]


def files(folder: Path, name: str, *references: str) -> tuple[str, ...]:
    """Arguments for a set of two sentences called `name`, with these references of both."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("the dog\na meadow\n")
    arguments = ["--source", str(folder / name)]
    for place, reference in enumerate(references):
        (folder / f"{name}.ref{place}").write_text(f"{reference}\n{reference}\n")
        arguments += ["--reference", str(folder / f"{name}.ref{place}")]
    return tuple(arguments)


# ---------------------------------------------------------------------------------------------------- tokenisers


@pytest.mark.parametrize(
    ("language", "name"),
    [
        *((code, "zh") for code in ("zh", "zh-CN", "zh_Hant", "ZH", "cmn", "zho")),
        *((code, "char") for code in ("th", "lo", "km", "my", "bo", "ja", "jpn", "ko-KR")),
        *((code, "13a") for code in ("de", "en", "fr", "cs", "zhx", "")),
    ],
)
def test_the_tokeniser_follows_the_target_language(monkeypatch: pytest.MonkeyPatch, language: str, name: str) -> None:
    monkeypatch.setattr(nmt.evaluation.tokenizers, "find_spec", lambda module: None)
    found = bleu_tokenizer("auto", language)
    assert found.name == name
    assert f"the target language is {language}" in str(found)


def test_japanese_and_korean_are_cut_into_words_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.evaluation.tokenizers, "find_spec", lambda module: None)
    assert "ja-mecab is not installed (pip install 'sacrebleu[ja]')" in bleu_tokenizer("auto", "ja").reason
    with pytest.raises(UserError, match=r"evaluation.tokenize=ko-mecab is not installed: pip install .*\[ko\]"):
        bleu_tokenizer("ko-mecab", "ko")
    monkeypatch.setattr(nmt.evaluation.tokenizers, "find_spec", lambda module: object())
    assert [bleu_tokenizer("auto", code).name for code in ("ja", "ko")] == ["ja-mecab", "ko-mecab"]


def test_the_setting_overrides_the_language() -> None:
    assert bleu_tokenizer("intl", "zh") == ("intl", "by evaluation.tokenize")
    with pytest.raises(ValueError, match=r"evaluation.tokenize=moses is not one of auto, 13a,"):
        EvaluationConfig(tokenize="moses")


def test_chinese_is_scored_by_its_characters() -> None:
    almost = [line.replace("天", "日") for line in CHINESE]
    tokenizer = bleu_tokenizer("auto", "zh").name
    bleu = corpus_scores(almost, [CHINESE], tokenizer)[0]
    assert 50 < bleu.value < 100
    assert "tok:zh" in bleu.signature
    assert corpus_scores(almost, [CHINESE], "13a")[0].value < 5


@pytest.mark.parametrize(
    ("tokenizer", "references", "fitting"),
    [
        ("13a", CHINESE, "zh"),
        ("intl", CHINESE, "zh"),
        ("13a", ["これはペンです。", "ありがとうございます"], "char"),
        ("zh", ["ผมไปโรงเรียน"], "char"),
        ("zh", CHINESE, ""),
        ("char", ["これはペンです。", "ผมไปโรงเรียน"], ""),
        ("13a", ["He said 你好 to her friends.", "1 2 3"], ""),
        ("13a", ["나는 학교에 갑니다"], ""),
        ("13a", [], ""),
        ("13a", ["", "123 %"], ""),
    ],
)
def test_a_tokeniser_that_does_not_fit_is_told(tokenizer: str, references: list[str], fitting: str) -> None:
    told = misfit(tokenizer, references)
    assert bool(told) == bool(fitting)
    assert told.endswith(f"evaluation.tokenize={fitting}" if fitting else "")


def test_evaluate_says_which_tokeniser_and_why(cli: Cli, copy: Path) -> None:
    assert cli("evaluate", str(copy)) == 0
    assert "BLEU tokeniser 13a: the target language is de" in cli.out
    assert cli("evaluate", str(copy), "--tokenize", "char") == 0
    assert "BLEU tokeniser char: by --tokenize" in cli.out
    assert "tok:char" in json.loads((copy / "report" / "test.json").read_text())["scores"]["BLEU"]["signature"]
    cli.refuses(2, "evaluate", str(copy), "--tokenize", "moses", says=("--tokenize", "moses", "13a"))
    cli.refuses(2, "evaluate", str(copy), "--show", "-1", says=("--show -1 must be at least 0",))
    cli.refuses(2, "evaluate", str(copy), "evaluation.tokenize=char", says=("only decoding.*", "--tokenize"))


def test_evaluate_warns_of_scores_that_say_nothing(cli: Cli, copy: Path, tmp_path: Path) -> None:
    assert cli("evaluate", str(copy), *files(tmp_path, "zh", CHINESE[0])) == 0
    assert cli.err.count("means nothing for references written without blanks: give --tokenize zh") == 1
    assert cli("evaluate", str(copy), *files(tmp_path, "blank", " ")) == 0
    assert "every reference of blank is blank: its scores mean nothing" in cli.err


# ------------------------------------------------------------------------------------------------------ the text


def test_several_references(cli: Cli, copy: Path, tmp_path: Path) -> None:
    one = files(tmp_path, "a", "der Hund läuft über die Wiese")
    both = files(tmp_path, "a", "der Hund läuft über die Wiese", "die kleine Wiese am Morgen")
    assert cli("evaluate", str(copy), *both, "--show", "1") == 0, cli.err
    assert "nrefs:2" in cli.out
    assert cli.out.count("reference   ") == 2
    (report,) = (copy / "report").glob("*.json")
    hypotheses = report.with_suffix(".hypotheses").read_text().splitlines()
    references = [[line] * 2 for line in ("der Hund läuft über die Wiese", "die kleine Wiese am Morgen")]
    for score in all_scores(hypotheses, references, "13a"):
        assert f"{score.value:.2f}" in cli.out.splitlines()[-8]
        assert f"{score.name:<10}  {score.signature}\n" in cli.out
    assert cli("evaluate", str(copy), *one) == 0
    assert "nrefs:1" in cli.out
    (tmp_path / "short").write_text("eins\n")
    says = ("a has 2 lines", "short has 1")
    cli.refuses(3, "evaluate", str(copy), *both, "--reference", str(tmp_path / "short"), says=says)


def test_fewer_checkpoints_than_the_average_asks_for_are_reported(cli: Cli, copy: Path) -> None:
    text = str(copy / "text" / "test.source")
    there = len(list_checkpoints(copy / "checkpoints"))
    for wanted, told in ((there, False), (there + 1, True)):
        average = ("decoding.checkpoint=average", f"decoding.average_checkpoints={wanted}")
        assert cli("translate", str(copy), text, *average) == 0, cli.err
        line = f"decoding.average_checkpoints={wanted}: {copy} has only {there} checkpoints\n"
        assert (line in cli.err) == told


@pytest.mark.parametrize("command", ["evaluate", "experts"])
def test_an_option_given_twice_is_never_dropped(cli: Cli, copy: Path, tmp_path: Path, command: str) -> None:
    arguments = files(tmp_path, "a", "der Hund")
    if command == "evaluate":
        cli.refuses(2, command, str(copy), *arguments, "--source", "b", says=("--source b has no --reference",))
    else:
        cli.refuses(2, command, str(copy), *arguments, "--source", "b", says=("--source", "given twice"))
        cli.refuses(2, command, str(copy), *arguments, "--reference", "b", says=("--reference", "given twice"))


def test_compressed_text_is_read_and_what_is_no_text_refused(cli: Cli, copy: Path, tmp_path: Path) -> None:
    plain = files(tmp_path, "a", "der Hund")
    assert cli("evaluate", str(copy), *plain) == 0
    scores = columns(cli.out)
    packed = tmp_path / "packed"  # whatever it is called
    packed.write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert cli("evaluate", str(copy), "--source", str(packed), *plain[2:]) == 0
    assert columns(cli.out) == scores
    wide = tmp_path / "wide"
    wide.write_bytes("the dog\na meadow\n".encode("utf-16-le"))
    cli.refuses(3, "evaluate", str(copy), "--source", str(wide), *plain[2:], says=(str(wide), "UTF-16", "iconv"))
    cli.refuses(3, "experts", str(copy), "--source", str(wide), *plain[2:], says=(str(wide), "UTF-16", "iconv"))


def test_empty_text_and_standard_input(cli: Cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = files(tmp_path, "a", "der Hund")
    (tmp_path / "empty").write_text("")
    cli.refuses(3, "evaluate", str(copy), "--source", str(tmp_path / "empty"), *arguments[2:], says=("empty is empty",))
    cli.refuses(2, "evaluate", str(copy), "--source", "-", "--reference", "-", says=("only one", "standard input"))
    with (tmp_path / "a").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert cli("evaluate", str(copy), "--source", "-", *arguments[2:]) == 0, cli.err
    assert re.search(r"^standard input +2 ", cli.out, re.M)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("test.target", b"eins\n" * 13, ("test.target", "it has 13 lines, but test.source 12")),
        ("test.target", None, ("test.target", "it has 0 lines, but test.source 12")),
        ("test.source", None, ("test.target", "it has 12 lines, but test.source 0")),
        ("test.domain", b"a\n" * 11, ("test.domain", "it has 11 lines, but test.source 12")),
        ("test.source", b"a\xffb\n" * 12, ("test.source", "byte 1 is not UTF-8")),
        ("test.source", b"a\n" * 11 + b"b", ("test.source", "its last line has no end")),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["evaluate", "experts"])
def test_damaged_text_of_a_run(
    cli: Cli, copy: Path, command: str, name: str, content: bytes | None, says: tuple[str, ...]
) -> None:
    path = copy / "text" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    cli.refuses(4, command, str(copy), says=(*says, "is damaged", "restore it"))


@pytest.mark.parametrize("option", [("--grow", "8"), ("--prune", "1")])
def test_a_new_run_is_never_made_by_text_that_does_not_pair(
    cli: Cli, copy: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    with (copy / "text" / "dev.target").open("a") as file:
        file.write("eins zu viel\n")
    arguments = ("experts", str(copy), *option, "-o", str(tmp_path / "new"))
    cli.refuses(4, *arguments, says=("dev.target is damaged",), progress=True)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------- the reports


@pytest.mark.slow
def test_reports_of_other_text_never_touch_those_of_the_runs_own(cli: Cli, copy: Path, tmp_path: Path) -> None:
    name = str(copy)
    own = (("evaluate", name), ("evaluate", name, "--split", "dev"), ("evaluate", name, "--dial", "1"))
    for arguments in (*own, ("experts", name), ("experts", name, "--explain", "the dog 的")):
        assert cli(*arguments) == 0, cli.err
    before = {path: path.read_bytes() for path in (copy / "report").iterdir()}
    assert {"test.json", "dev.json", "dial.json", "experts.json"} <= {path.name for path in before}
    for other in ("test", "dev", "dial", "experts", "explain", "test.json", "a b\n|`c", "x" * 250):
        assert cli("evaluate", name, *files(tmp_path / "o", other, "der Hund")) == 0, cli.err
    arguments = files(tmp_path / "o", "test", "der Hund")
    assert cli("evaluate", name, *arguments, "--dial", "1") == 0
    assert cli("experts", name, *arguments) == 0
    assert {path: path.read_bytes() for path in before} == before
    added = {path.name for path in (copy / "report").iterdir()} - {path.name for path in before}
    assert len(added) == 8 * 2 + 1 + 3
    assert all("set-" in each and "\n" not in each for each in added)


def test_sets_of_the_same_name_are_kept_apart_and_say_what_they_are(cli: Cli, copy: Path, tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder, reference in zip(folders, ("der Hund", "die Wiese"), strict=True):
        assert cli("evaluate", str(copy), *files(folder, "src.en", reference)) == 0
        assert cli("evaluate", str(copy), *files(folder, "src.en", reference)) == 0
    reports = [json.loads(path.read_text()) for path in (copy / "report").glob("set-src.en-*.json")]
    assert {report["source"]["path"] for report in reports} == {str(folder / "src.en") for folder in folders}
    for report in reports:
        assert (report["own"], report["title"], report["sentences"]) == (False, "src.en", 2)
        for side in (report["source"], *report["references"]):
            assert side["sha256"] == hashlib.sha256(Path(side["path"]).read_bytes()).hexdigest()
    assert cli("evaluate", str(copy)) == 0
    own = json.loads((copy / "report" / "test.json").read_text())
    assert (own["set"], own["own"], own["references"]) == ("test", True, [])


@pytest.mark.parametrize(
    "arguments", [("evaluate",), ("evaluate", "--dial", "1"), ("experts",), ("experts", "--explain", "the dog")]
)
def test_a_folder_that_cannot_be_written_is_told_after_the_result(
    cli: Cli, copy: Path, arguments: tuple[str, ...]
) -> None:
    (copy / "report").write_text("in the way")
    assert cli(arguments[0], str(copy), *arguments[1:]) == 0, cli.err
    assert cli.out
    assert cli.err.splitlines()[-1].startswith("the report was not written: cannot write")
    assert (copy / "report").read_text() == "in the way"


def test_reports_that_are_kept_at_once_do_not_meet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    texts = {str(number): str(number) * 100_000 for number in range(8)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: keep(run, {"a": text, "b": text}, "kept"), texts.values()))
    assert "not written" not in capfd.readouterr().err
    assert sorted(path.name for path in run.report.iterdir()) == ["a", "b"]
    assert all((run.report / name).read_text() in texts.values() for name in ("a", "b"))


# ------------------------------------------------------------------------------------------------ very long pairs


@pytest.mark.parametrize("seed", range(4))
def test_long_pairs_come_few_at_a_time(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.geometric(0.01, (2, 60)), 1024)
    sides = [[np.full(length, 7) for length in side] for side in lengths]
    seen = []
    for batch in eval_batches(*sides, 500):
        size = batch.pairs_B.numel()
        source, target = batch.source.num_positions, batch.target.num_positions
        tokens = max(source, target) * size
        area = source * target * size
        assert size == 1 or (tokens <= 500 and area <= 500 * 256)
        seen += batch.pairs_B.tolist()
    assert sorted(seen) == list(range(60))


def test_of_a_very_long_pair_the_beginning_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subwords = load_vocabulary(RunDirectory(run))
    monkeypatch.setattr(held_out, "LONGEST_SIDE", 6)
    sources, targets = ["the dog", "the dog " * 9, "dog"], ["der Hund", "der Hund", "Hund " * 7]
    found = encode_pairs(subwords, sources, targets)
    assert max(map(len, (*found.sources, *found.targets))) == 6
    assert found.cut == [1, 2]
    assert describe_cut(found.cut).startswith("2 pairs have more than 6 subwords on a side (line 2 is the first)")
    assert describe_cut([4]).startswith("1 pair has more than 6 subwords on a side (line 5)")
    assert describe_cut([]) == ""

    config = Config()
    config.model.hidden_size = config.model.cell_size = 8
    model = Seq2Seq(config.model, subwords.size).eval()
    world = World(torch.device("cpu"))
    cut = perplexity(model, subwords, sources, targets, 100, world)
    assert cut.cut == (1, 2)
    texts = [[subwords.decode(pieces.tolist()) for pieces in side] for side in (found.sources, found.targets)]
    short = perplexity(model, subwords, *texts, 100, world)
    assert short.cut == ()
    assert (cut.pieces, cut.words) == pytest.approx((short.pieces, short.words), rel=1e-5)


@pytest.mark.slow
def test_evaluate_tells_of_a_long_pair(cli: Cli, copy: Path, tmp_path: Path) -> None:
    arguments = files(tmp_path, "a", "der Hund")
    (tmp_path / "a").write_text("a meadow\n" + "the dog " * 3000 + "\n")
    assert cli("evaluate", str(copy), *arguments, "decoding.beam_size=1") == 0, cli.err
    assert "perplexity of a: 1 pair has more than 1,024 subwords on a side (line 2)" in cli.err
    assert cli("experts", str(copy), *arguments) == 0, cli.err
    assert "1 pair has more than 1,024 subwords on a side (line 2)" in cli.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 209062930756"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB"),
    ],
    ids=["host", "PyTorch", "GPU"],
)
def test_no_memory_is_one_line_that_names_the_pair(error: Exception) -> None:
    def model(*_: Any, **__: Any) -> None:
        raise error

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.full(len(text.split()), 7) for text in texts]

    subwords: Any = SimpleNamespace(encode_batch=encode)
    network: Any = SimpleNamespace(encode=model)
    sources, targets = ["a", "a b c", "a b"], ["a b", "a b c d", "a"]
    with pytest.raises(MemoryLimitError, match=r"of memory in scoring 3 .* line 2, has 3 and 4 subwords.*: shorten"):
        perplexity(network, subwords, sources, targets, 100, World(torch.device("cpu")))
