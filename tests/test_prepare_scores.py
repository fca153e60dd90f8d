"""nmt prepare --scores: what each rule measures, for all pairs, whatever rules are active."""

from pathlib import Path

from nmt.config import FilterConfig
from nmt.corpus.rules import HeldOutTexts
from nmt.preparation.scores import write_scores
from tests.test_prepare import corpus_of, write_text


def test_a_line_per_pair_and_a_line_per_rule(tmp_path: Path) -> None:
    write_text(tmp_path, 60)
    with (tmp_path / "train.en").open("a") as stream:
        stream.write("same\ttext\n")
    with (tmp_path / "train.de").open("a") as stream:
        stream.write("same\ttext\n")
    corpus = corpus_of(tmp_path, filters=FilterConfig(max_words=3), max_pairs=0)
    found = []
    for processes in (1, 2):
        path = tmp_path / f"scores{processes}.tsv"
        with path.open("wb") as stream:
            told = list(write_scores(corpus, HeldOutTexts(), stream, processes, lambda *_: None))
        found.append(path.read_text())
    assert found[0] == found[1]
    header, *lines = (line.split("\t") for line in found[0].splitlines())
    assert header[:5] == ["file", "row", "direction", "blank", "identical"]
    assert len(lines) == 61
    assert {len(line) for line in lines} == {len(header)}  # a TAB of a text is a blank here
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [int(row["row"]) for row in rows] == list(range(1, 62))
    assert (rows[-1]["identical"], rows[-1]["source"]) == ("1", "same text")
    source = (tmp_path / "train.en").read_text().splitlines()
    assert [float(row["max_words"]) for row in rows] == [len(line.split()) for line in source]
    assert told[0].startswith("61 pairs scored")
    assert not any("nan" in line or "min_score" in line for line in told)
