"""The rules of a search, each against a plain one that looks at one hypothesis at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.decoding.rules import NEVER, Rules, drop_distant, repeats
from nmt.tokens import BOS, EOS, NUM_SPECIAL, PAD, UNK

VOCAB = NUM_SPECIAL + 4
FORBIDDEN = [PAD, UNK, BOS]
BEAM, SENTENCES, LONGEST = 3, 5, 9


def histories(seed: int, length: int) -> Tensor:
    """Random subwords before number `length`, then PAD."""
    rng = np.random.default_rng(seed)
    history_KBL = torch.full((BEAM, SENTENCES, LONGEST), PAD)
    history_KBL[:, :, : length - 1] = torch.tensor(rng.integers(NUM_SPECIAL, VOCAB, (BEAM, SENTENCES, length - 1)))
    return history_KBL


def logits_of(seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((BEAM, SENTENCES, VOCAB)), dtype=torch.float32)


def rules_of(
    least: list[int] | None = None,
    prefixes: list[list[int]] | None = None,
    no_repeat: int = 0,
    sentences: int = SENTENCES,
) -> Rules:
    longest = max(map(len, prefixes)) if prefixes else 0
    padded = [[*prefix, *[PAD] * (longest - len(prefix))] for prefix in prefixes] if prefixes else None
    return Rules(
        torch.tensor(least or [1] * sentences),
        torch.tensor([LONGEST] * sentences),
        torch.tensor(FORBIDDEN),
        prefix_BP=None if padded is None else torch.tensor(padded),
        no_repeat=no_repeat,
    )


def is_repeated(so_far: list[int], token: int, n: int) -> bool:
    """Whether the run of n subwords that ends with the next one is in the text before."""
    text = [*so_far, token]
    runs = [text[start : start + n] for start in range(len(text) - n + 1)]
    return len(text) >= n and runs[-1] in runs[:-1]


@pytest.mark.parametrize("length", range(1, LONGEST + 1))
@pytest.mark.parametrize("no_repeat", [0, 1, 2, 3, 12])
def test_what_may_come_next(no_repeat: int, length: int) -> None:
    """Subword by subword; the least lengths and the prefixes differ between the sentences."""
    least, prefixes = [1, 3, 9, 2, 1], [[], [4, 4, 4, 4], [5], [7, 6], [6, 7, 6, 7, 6, 7]]
    history_KBL, before = histories(length, length), logits_of(length)
    after = before.clone()
    rules_of(least, prefixes, no_repeat).forbid_(after, torch.tensor(length), history_KBL)
    for k in range(BEAM):
        for b in range(SENTENCES):
            so_far = history_KBL[k, b, : length - 1].tolist()
            for token in range(VOCAB):
                if length <= len(prefixes[b]):
                    allowed = token == prefixes[b][length - 1]
                else:
                    repeated = no_repeat > 0 and token != EOS and is_repeated(so_far, token, no_repeat)
                    allowed = not (token in FORBIDDEN or (token == EOS and length < least[b]) or repeated)
                assert after[k, b, token] == (before[k, b, token] if allowed else NEVER), (k, b, token)


def test_without_rules_only_the_forbidden_ones_go() -> None:
    logits = logits_of(1)
    after = logits.clone()
    rules_of().forbid_(after, torch.tensor(1), torch.zeros(BEAM, SENTENCES, 0, dtype=torch.int64))
    assert torch.equal(after[:, :, EOS:], logits[:, :, EOS:])
    assert (after[:, :, :EOS] == NEVER).all()


def test_slots_are_allowed_in_their_sentences() -> None:
    """UNK and BOS as slots: what is forbidden otherwise keeps its logit where it is allowed."""
    before = logits_of(0)
    slots = [[BOS, PAD], [PAD, PAD], [UNK, BOS], [UNK, PAD], [PAD, PAD]]
    rules = rules_of()._replace(slots_BG=torch.tensor(slots))
    for chosen in (list(range(SENTENCES)), [3, 1]):
        after = before[:, chosen].clone()
        rules.select(torch.tensor(chosen)).forbid_(after, torch.tensor(1), torch.zeros(BEAM, len(chosen), 0))
        for place, sentence in enumerate(chosen):
            allowed = [
                token for token in range(VOCAB) if token not in FORBIDDEN or token in set(slots[sentence]) - {PAD}
            ]
            expected = torch.full((BEAM, VOCAB), NEVER)
            expected[:, allowed] = before[:, sentence, allowed]
            assert torch.equal(after[:, place], expected)
    assert not rules.same_for_all


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeats_are_named_and_nothing_else(n: int) -> None:
    for length in range(1, LONGEST + 2):
        history_KBL = histories(7, length)
        found_KBW = repeats(history_KBL, torch.tensor(length), n)
        for k in range(BEAM):
            for b in range(SENTENCES):
                so_far = history_KBL[k, b, : length - 1].tolist()
                expected = {token for token in range(NUM_SPECIAL, VOCAB) if is_repeated(so_far, token, n)}
                assert set(found_KBW[k, b].tolist()) - {PAD} == expected


def test_rules_of_some_of_the_sentences() -> None:
    """Select, then forbid; or forbid, then select."""
    least, prefixes, chosen = [1, 5, 9, 2, 1], [[], [4, 4], [5], [7, 6], [6]], torch.tensor([3, 0, 2])
    rules = rules_of(least, prefixes, 2)._replace(stream_B=torch.arange(SENTENCES))
    history_KBL, length = histories(3, 2), torch.tensor(2)
    whole, part = logits_of(5), logits_of(5)[:, chosen]
    rules.forbid_(whole, length, history_KBL)
    rules.select(chosen).forbid_(part, length, history_KBL[:, chosen])
    assert torch.equal(part, whole[:, chosen])
    assert rules.select(chosen).stream_B.tolist() == [3, 0, 2]
    assert rules.select(chosen).max_length_B.shape == (3,)


def test_nothing_depends_on_the_host() -> None:
    """The meta device has shapes and no values, so whatever waits for one fails there."""
    rules = rules_of([2] * SENTENCES, [[4]] * SENTENCES, 2)
    rules = Rules(*(each.to("meta") if isinstance(each, Tensor) else each for each in rules))
    rules.forbid_(logits_of(1).to("meta"), torch.tensor(2, device="meta"), histories(1, 2).to("meta"))


def test_those_far_below_the_best_are_dropped() -> None:
    values_CB = torch.tensor([[-1.0, -5.0], [-3.9, -8.1], [NEVER, -7.9]])
    found = drop_distant(values_CB, values_CB.amax(0), 3.0)
    assert found.tolist() == [[-1.0, -5.0], [pytest.approx(-3.9), NEVER], [NEVER, pytest.approx(-7.9)]]
    assert torch.equal(drop_distant(values_CB, torch.full((2,), NEVER), 3.0), values_CB)
    assert not math.isnan(float(drop_distant(torch.full((1, 1), NEVER), torch.full((1,), NEVER), 3.0)))
