"""Properties of the schedule."""

import dataclasses
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_accel.dealing import imbalance
from wan_accel.draws import NO_KNOWN, Bucket, DatasetIndex, SampleDraw, Step, TokenBudget, describe_buckets
from wan_accel.held_out import fixed_draws, split_groups
from wan_accel.models.variants import VARIANTS
from wan_accel.objective import NoiseLevels
from wan_accel.step_plan import StepPlan

BUCKETS = [Bucket(17, 256, 448), Bucket(33, 256, 448), Bucket(81, 480, 832)]
RANK_COUNTS = [1, 2, 3, 4, 6, 12]


def make_index(counts: list[int], num_known: int = 3) -> DatasetIndex:
    buckets = tuple(bucket for bucket, count in zip(BUCKETS, counts) for _ in range(count))
    return DatasetIndex(buckets=buckets, num_known=(num_known,) * len(buckets))


def make_plan(counts: list[int], **options: object) -> StepPlan:
    return StepPlan(make_index(counts), **{"seed": 3, "global_batch": 12, "caption_dropout": 0.2, **options})


def true_draws(step: Step) -> list[SampleDraw]:
    draws = [draw for micro in step.micro_steps for hand in micro.samples for draw in hand if draw.weight]
    return sorted(draws, key=lambda draw: (draw.index, draw.epoch))


datasets = st.lists(st.integers(0, 60), min_size=3, max_size=3).filter(lambda counts: sum(counts) > 0)


@settings(max_examples=30, deadline=None)
@given(counts=datasets, seed=st.integers(0, 2**63), batch=st.sampled_from([1, 4, 12, 24]), micro=st.integers(1, 3))
def test_steps_do_not_depend_on_the_ranks(counts: list[int], seed: int, batch: int, micro: int) -> None:
    plan = make_plan(counts, seed=seed, global_batch=batch, micro_batch=micro)
    for number in range(plan.steps_per_epoch):
        expected = true_draws(plan.step(number, 1))
        for num_ranks in RANK_COUNTS:
            step = plan.step(number, num_ranks)
            assert true_draws(step) == expected
            assert step.num_samples == len(expected) <= batch
            for micro_step in step.micro_steps:
                assert len(micro_step.samples) == num_ranks
                assert all(1 <= len(hand) <= micro for hand in micro_step.samples)
                assert {plan.index.buckets[d.index] for hand in micro_step.samples for d in hand} == {micro_step.bucket}


@settings(max_examples=30, deadline=None)
@given(counts=datasets, seed=st.integers(0, 2**63), epoch=st.integers(0, 3))
def test_every_sample_once_an_epoch(counts: list[int], seed: int, epoch: int) -> None:
    plan = make_plan(counts, seed=seed)
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(first + number, 4) for number in range(plan.steps_per_epoch)]
    rows = Counter(draw.index for step in steps for draw in true_draws(step))
    assert rows == Counter(range(sum(counts)))
    assert {step.epoch for step in steps} == {epoch}


def tokens_of(num_frames: int, height: int, width: int) -> int:
    return ((num_frames - 1) // 4 + 1) * (height // 16) * (width // 16)


HIGH, LOW = VARIANTS["t2v-a14b"].experts


@settings(max_examples=30, deadline=None)
@given(
    counts=datasets, seed=st.integers(0, 2**63), tokens=st.integers(1000, 200_000), multiple=st.sampled_from([1, 4]),
    pair=st.booleans(),
)  # fmt: skip
def test_token_budgets(counts: list[int], seed: int, tokens: int, multiple: int, pair: bool) -> None:
    budget = TokenBudget(tokens=tokens, num_tokens=tokens_of, multiple_of=multiple)
    experts = {"experts": (HIGH, LOW)} if pair else {}
    micro = TokenBudget(tokens=20_000, num_tokens=tokens_of)
    plan = make_plan(counts, seed=seed, global_batch=budget, micro_batch=micro, **experts)
    for epoch in range(2):
        numbers = range(plan.start_of(epoch), plan.start_of(epoch + 1))
        steps = [plan.step(number, 4) for number in numbers]
        assert [plan.locate(number)[0] for number in numbers] == [epoch] * len(numbers)
        rows = Counter(draw.index for step in steps for draw in true_draws(step))
        assert rows == Counter(range(sum(counts)))
        for number, step in zip(numbers, steps):
            assert true_draws(plan.step(number, 1)) == true_draws(step)
            shares = Counter(plan.index.buckets[draw.index] for draw in true_draws(step))
            # A step is never over the budget, or is one multiple of a bucket whose samples alone are over it.
            assert sum(count / budget.samples(bucket) for bucket, count in shares.items()) <= 1 + 1e-9
            for micro_step in step.micro_steps:
                assert all(len(hand) <= micro.samples(micro_step.bucket) for hand in micro_step.samples)
                owners = {plan.expert_at(draw.sigma) for hand in micro_step.samples for draw in hand}
                assert owners == {micro_step.expert}
    assert plan.num_steps(2) == plan.start_of(2) and plan.epochs_at(plan.start_of(1)) == 1.0


def test_a_budget_gives_small_clips_larger_batches() -> None:
    budget = TokenBudget(tokens=70_000, num_tokens=tokens_of, multiple_of=2)
    assert [budget.samples(bucket) for bucket in BUCKETS] == [30, 16, 2]
    plan = make_plan([100, 100, 100], global_batch=budget)
    sizes = Counter(step.num_samples for step in (plan.step(n, 2) for n in range(plan.steps_per_epoch)))
    assert {30, 16, 2} <= set(sizes)
    for num_ranks in (1, 2):
        steps = [plan.step(number, num_ranks) for number in range(plan.steps_per_epoch)]
        assert imbalance(steps, lambda bucket: tokens_of(*bucket)) <= 0.05


def test_a_plan_can_be_sent_to_data_workers() -> None:
    plan = make_plan([7, 5, 3])
    expected = plan.step(4, 2)
    assert pickle.loads(pickle.dumps(plan)).step(4, 2) == expected


def test_balance_on_mixed_buckets() -> None:
    plan = make_plan([1100, 600, 300])

    def flops(bucket: Bucket) -> float:
        tokens = bucket.num_frames * bucket.height * bucket.width / 1024
        return tokens * 1e6 + tokens**2

    for num_ranks in RANK_COUNTS:
        steps = [plan.step(number, num_ranks) for number in range(plan.steps_per_epoch)]
        assert imbalance(steps, flops) <= 0.05
        ordinary = [step for step in steps if len({micro.bucket for micro in step.micro_steps}) == 1]
        full = [step for step in ordinary if step.num_samples == 12]
        assert len(full) >= 0.95 * len(steps)
        assert imbalance(full, flops) == 0


def test_same_seed_and_step_same_draws() -> None:
    again = make_plan([50, 30, 20]).step(7, 4)
    assert make_plan([50, 30, 20]).step(7, 4) == again
    assert make_plan([50, 30, 20], seed=4).step(7, 4) != again
    # Known values: a change of the hash would silently change every run.
    draw = true_draws(make_plan([50, 30, 20]).step(0, 1))[0]
    assert (draw.index, draw.noise_seed) == KNOWN_DRAW


def test_frequencies() -> None:
    plan = make_plan([1000, 1000, 1000], caption_dropout=0.2, face_dropout=0.05)
    draws = [draw for n in range(plan.steps_per_epoch) for draw in true_draws(plan.step(n, 1))]
    assert sum(draw.drop_caption for draw in draws) / 3000 == pytest.approx(0.2, abs=0.03)
    assert sum(draw.drop_face for draw in draws) / 3000 == pytest.approx(0.05, abs=0.02)
    assert all(count > 850 for count in Counter(draw.known for draw in draws).values())
    assert {draw.known for draw in draws} == {0, 1, 2}
    assert len({draw.noise_seed for draw in draws}) == 3000
    second = [draw for n in range(plan.steps_per_epoch) for draw in true_draws(plan.step(n + plan.steps_per_epoch, 1))]
    assert not {d.noise_seed for d in draws} & {d.noise_seed for d in second}
    plain = StepPlan(make_index([5, 0, 0], num_known=0), seed=0, global_batch=5).step(0, 1)
    assert {draw.known for draw in true_draws(plain)} == {NO_KNOWN}


def test_image_dropout_changes_nothing_else() -> None:
    with_image, without = (make_plan([400, 0, 0], image_dropout=share) for share in (0.0, 0.3))
    pairs = [
        (kept, dropped)
        for n in range(with_image.steps_per_epoch)
        for kept, dropped in zip(true_draws(with_image.step(n, 1)), true_draws(without.step(n, 1)))
    ]
    assert not any(kept.drop_image for kept, _ in pairs)
    assert sum(dropped.drop_image for _, dropped in pairs) / 400 == pytest.approx(0.3, abs=0.06)
    assert [kept for kept, _ in pairs] == [dataclasses.replace(dropped, drop_image=False) for _, dropped in pairs]


def test_experts() -> None:
    high, low = VARIANTS["t2v-a14b"].experts
    levels = NoiseLevels(shift=12.0)
    both = StepPlan(make_index([300, 0, 0]), seed=0, global_batch=12, levels=levels, experts=(high, low))
    counts: Counter[str] = Counter()
    for number in range(both.steps_per_epoch):
        for micro in both.step(number, 2).micro_steps:
            sigmas = [draw.sigma for hand in micro.samples for draw in hand]
            inside = [sigma >= 0.875 for sigma in sigmas]
            assert all(inside) if micro.expert == "high" else not any(inside)
            counts[micro.expert] += sum(draw.weight > 0 for hand in micro.samples for draw in hand)
    assert counts["high"] / 300 == pytest.approx(1 - levels.share_below(0.875), abs=0.1)
    alone = StepPlan(make_index([300, 0, 0]), seed=0, global_batch=12, levels=levels, experts=(low,))
    assert all(draw.sigma <= 0.875 for n in range(alone.steps_per_epoch) for draw in true_draws(alone.step(n, 1)))


def test_split_without_leakage() -> None:
    groups = [f"source{n // 5}" for n in range(200)]
    train, evaluation = split_groups(groups, fraction=0.1, seed=0)
    assert sorted(train + evaluation) == list(range(200))
    assert not {groups[row] for row in train} & {groups[row] for row in evaluation}
    assert 20 <= len(evaluation) <= 24
    _, more_evaluation = split_groups([*groups, "another"], fraction=0.1, seed=0)
    assert len(set(evaluation) ^ set(more_evaluation)) <= 6
    assert split_groups(groups, fraction=0.0, seed=0) == (list(range(200)), [])


def test_fixed_draws() -> None:
    draws = fixed_draws(make_index([2, 0, 0]), [0, 1], num_sigmas=8, seed=0)
    assert [draw.sigma for draw in draws[:8]] == [(n + 0.5) / 8 for n in range(8)]
    assert len({draw.noise_seed for draw in draws}) == 16
    assert not any(draw.drop_caption or draw.drop_face for draw in draws)
    low = VARIANTS["t2v-a14b"].experts[1]
    assert max(d.sigma for d in fixed_draws(make_index([1, 0, 0]), [0], num_sigmas=8, seed=0, expert=low)) < 0.875


def test_errors() -> None:
    with pytest.raises(ValueError, match="training split has no rows"):
        make_plan([0, 0, 0])
    with pytest.raises(ValueError, match="global_batch=0"):
        make_plan([1, 0, 0], global_batch=0)


KNOWN_DRAW = (81, 5449504946008771989)


def test_buckets_are_described_with_the_largest_first() -> None:
    buckets = [Bucket(5, 32, 48)] * 3 + [Bucket(9, 64, 64)]
    text = describe_buckets(buckets, VARIANTS["t2v-1.3b"].num_tokens)
    assert text == "4 rows in 2 buckets (9 frames of 64x64: 1, 5 frames of 32x48: 3)"
