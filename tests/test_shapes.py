"""Few shapes for the batches of a plan: they hold them all, and padding is little."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.batch import Shape
from nmt.config import TrainingConfig
from nmt.data.batching import plan_epoch
from nmt.data.shapes import few_shapes, shape_of, work

SHAPES = st.lists(st.builds(Shape, *(st.integers(1, 40) for _ in range(5))), min_size=1, max_size=12)


def lowest_cost(needed: list[Shape], most: int) -> int:
    """The least work of any division of batches into `most` groups, each padded to its largest sizes."""

    def cost(groups: tuple[int, ...]) -> int:
        members = [[shape for shape, group in zip(needed, groups, strict=True) if group == one] for one in set(groups)]
        return sum(len(own) * work(Shape(*map(max, zip(*own, strict=True)))) for own in members)

    return min(cost(groups) for groups in itertools.product(range(most), repeat=len(needed)))


@given(SHAPES, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_every_batch_has_a_place_and_more_shapes_never_add_padding(needed: list[Shape], most: int) -> None:
    grid, finer = few_shapes(needed, most), few_shapes(needed, most + 1)
    assert 1 <= len(grid.shapes) <= most
    for shape in needed:
        found = grid.smallest(shape)
        assert found is not None
        assert found.holds(shape)

    def total(shapes: list[Shape]) -> int:
        return sum(min(work(each) for each in shapes if each.holds(shape)) for shape in needed)

    assert total(finer.shapes) <= total(grid.shapes)
    if most >= len(set(needed)):
        assert grid.padding(needed) == (0.0, 0.0)


def test_two_shapes_are_the_best_two() -> None:
    """Where one cut divides what belongs apart, it is found, along whichever size."""
    for size in range(5):
        needed = [
            Shape(*(30 if place == size else 5 for place in range(5))),
            Shape(5, 5, 5, 5, 5),
            Shape(4, 5, 4, 5, 5),
        ]
        grid = few_shapes(needed, 2)
        cost = sum(work(found) for shape in needed if (found := grid.smallest(shape)))
        assert cost == lowest_cost(needed, 2)


def test_padding_is_the_share_of_what_is_computed() -> None:
    small, large = Shape(2, 3, 2, 5, 4), Shape(4, 3, 2, 10, 8)
    padding = few_shapes([small, large], 1).padding([small, large])
    assert padding.positions == pytest.approx(1 - (2 * 5 + 4 * 5) / (2 * 4 * 5))
    assert padding.rows == pytest.approx(1 - (9 + 18) / (2 * 18))


def test_a_batch_that_no_shape_holds_passes_as_it_is() -> None:
    grid = few_shapes([Shape(2, 3, 2, 5, 4)], 1)
    assert grid.smallest(Shape(3, 3, 2, 5, 4)) is None
    assert grid.padding([Shape(3, 3, 2, 5, 4)]) == (0.0, 0.0)


def test_a_plan_needs_few_shapes() -> None:
    """Batches of similar lengths under one budget of positions: a few dozen shapes pad less than a tenth."""
    rng = np.random.default_rng(1)
    source = rng.poisson(rng.gamma(3.0, 8.0, 6000)) + 1
    target = np.maximum(1, np.round(source * rng.lognormal(0.05, 0.15, 6000))).astype(np.int64)
    plan = plan_epoch(source, target, TrainingConfig(batch_tokens=1024, micro_batches=1), epoch=0)
    needed = [shape_of(pairs, source, target) for step in plan for bands in step for pairs in bands]
    assert sum(shape.sentences for shape in needed) == 6000
    paddings = [few_shapes(needed, most).padding(needed) for most in (1, 8, 48)]
    assert [padding.positions for padding in paddings] == sorted((each.positions for each in paddings), reverse=True)
    assert max(paddings[-1]) < 0.1


@pytest.mark.parametrize(("needed", "most"), [([], 3), ([Shape(1, 1, 1, 1, 1)], 0)])
def test_nothing_is_refused(needed: list[Shape], most: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        few_shapes(needed, most)
