"""Shares of an epoch, coverage, and that a step of a mixture is a function of (seed, step) alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from wan_accel.data.mixture import Mixture, folder_names
from wan_accel.draws import Bucket, DatasetIndex
from wan_accel.step_plan import StepPlan

SMALL, LARGE, WIDE = range(4), range(4, 34), range(34, 40)
INDEX = DatasetIndex(buckets=(Bucket(5, 32, 32),) * 34 + (Bucket(5, 32, 48),) * 6, num_known=(3,) * 40)


def mixture(weights: tuple[float, ...] = (2.0, 1.0, 1.0), seed: int = 3) -> Mixture:
    return Mixture([SMALL, LARGE, WIDE], weights, num_rows=40, seed=seed)


def dataset_of(item: int) -> int:
    return next(number for number, rows in enumerate((SMALL, LARGE, WIDE)) if item % 40 in rows)


def test_shares_of_an_epoch_are_the_weights() -> None:
    assert mixture().counts == [20, 10, 10]
    for epoch in range(5):
        items = mixture().of(epoch)
        assert len(set(items.tolist())) == 40
        assert Counter(map(dataset_of, items.tolist())) == {0: 20, 1: 10, 2: 10}
    assert Mixture([range(3), range(3, 6), range(6, 7)], [1, 1, 1], num_rows=7, seed=0).counts == [3, 2, 2]


def test_default_weights_use_every_row_once() -> None:
    plain = Mixture([SMALL, LARGE, WIDE], [4, 30, 6], num_rows=40, seed=3)
    assert sorted(plain.of(2).tolist()) == list(range(40))


def test_rows_of_a_dataset_are_used_equally_often() -> None:
    uses = Counter(int(item) % 40 for epoch in range(7) for item in mixture().of(epoch))
    for rows, total in ((SMALL, 140), (LARGE, 70), (WIDE, 70)):
        counts = [uses[row] for row in rows]
        assert sum(counts) == total and max(counts) - min(counts) <= 1


def test_epochs_differ_and_repeat() -> None:
    first = mixture().of(4)
    np.testing.assert_array_equal(first, mixture().of(4))
    assert set(first.tolist()) != set(mixture().of(5).tolist())
    assert set(first.tolist()) != set(mixture(seed=4).of(4).tolist())


def plan() -> StepPlan:
    return StepPlan(INDEX, seed=3, global_batch=4, mixture=mixture())


def test_steps_depend_on_seed_and_step_alone() -> None:
    """Resumed at any step, on another number of ranks, a step has the same samples."""
    whole = plan()
    steps = [whole.step(step, 1) for step in range(25)]
    for step in (24, 3, 11):
        for num_ranks in (1, 2, 4):
            draws = [d for m in plan().step(step, num_ranks).micro_steps for hand in m.samples for d in hand]
            found = sorted((d.index, d.noise_seed, d.sigma, d.known) for d in draws if d.weight)
            expected = [d for m in steps[step].micro_steps for hand in m.samples for d in hand]
            assert found == sorted((d.index, d.noise_seed, d.sigma, d.known) for d in expected)
    assert whole.steps_per_epoch == 10


def test_every_use_of_a_row_in_an_epoch_is_drawn_anew() -> None:
    draws = [d for step in range(10) for m in plan().step(step, 1).micro_steps for hand in m.samples for d in hand]
    assert Counter(draw.index for draw in draws)[0] == 5
    assert len({draw.noise_seed for draw in draws}) == len({draw.sigma for draw in draws}) == 40
    assert all(m.bucket == INDEX.buckets[d.index] for step in range(10) for m in plan().step(step, 1).micro_steps
               for hand in m.samples for d in hand)  # fmt: skip


def test_dataset_without_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.datasets\[1\] has 30 rows to train on and 0 of an epoch's 40: raise"):
        mixture((1.0, 1e-6, 1.0))
    with pytest.raises(ValueError, match=r"data\.datasets\[0\] has 0 rows"):
        Mixture([[], [0]], [1, 1], num_rows=1, seed=0)


def test_folders_are_named_by_what_tells_them_apart() -> None:
    assert folder_names([Path("/data/a/latents")]) == [""]
    assert folder_names([Path("/data/a"), Path("/data/b")]) == ["a", "b"]
    assert folder_names([Path("/data/a/latents"), Path("/data/b/latents")]) == ["a/latents", "b/latents"]
    assert len(folder_names([Path("/data/a"), Path("/data/a")])) == 2
