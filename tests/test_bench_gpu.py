"""scripts/bench/gpu.py: its networks and batches exist as described. The figures need a GPU."""

import pytest

from nmt.batch import fit
from tests.scripts import load_script

script = load_script("scripts/bench/gpu.py")


@pytest.mark.parametrize("name", script.CASES)
def test_the_shape_of_a_case_holds_its_updates(name: str):
    case = script.CASES[name]
    config, vocabulary, steps, shape = script.prepare(case, updates=2)
    assert case.against in ("", *script.CASES)
    for step in steps:
        assert len(step) == (1 if case.sentences else config.training.micro_batches)
        for batch in step:
            assert fit(batch, shape).num_target_tokens == batch.num_target_tokens
            assert vocabulary > batch.source_N.max() >= 4
    rows = sum(batch.num_source_tokens + batch.num_target_tokens for step in steps for batch in step)
    if not case.sentences:
        assert 0.85 * 65536 <= rows / len(steps) <= 65536


def test_one_length_and_many():
    lengths = [
        {int(length) for step in script.prepare(script.CASES[name], 2)[2] for length in step[0].source.length_B}
        for name in ("MoE-32, one length", "MoE-32")
    ]
    assert len(lengths[0]) == 1
    assert len(lengths[1]) > 30
