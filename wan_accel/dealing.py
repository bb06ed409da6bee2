"""How samples fall on steps and ranks: what is left of buckets is packed, hands are dealt in turn. Pure, torch-free."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from wan_accel.draws import BatchSize, Bucket, MicroStep, SampleDraw, Step, num_samples

# Samples of one bucket and expert.
Group = tuple[tuple[Bucket, str], np.ndarray]


def pack(tail: Sequence[Group], global_batch: BatchSize) -> list[list[Group]]:
    """Fill steps with what is left of every group, in order; a sample takes the share 1 / (its batch) of a step."""
    steps: list[list[Group]] = []
    room = Fraction(0)
    for key, rows in tail:
        size = num_samples(global_batch, key[0])
        while len(rows):
            if room * size < 1:
                steps.append([])
                room = Fraction(1)
            count = min(len(rows), int(room * size))
            steps[-1].append((key, rows[:count]))
            rows, room = rows[count:], room - Fraction(count, size)
    return steps


def deal(
    bucket: Bucket,
    expert: str,
    draws: Sequence[SampleDraw],
    num_ranks: int,
    micro_batch: int,
    first_rank: int,
) -> list[MicroStep]:
    """Deal samples to ranks in turn, then cut every rank's hand into micro-steps."""
    hands: list[list[SampleDraw]] = [[] for _ in range(num_ranks)]
    for position, draw in enumerate(draws):
        hands[(first_rank + position) % num_ranks].append(draw)
    filler = (_as_filler(draws[0]),)
    return [
        MicroStep(
            bucket=bucket,
            expert=expert,
            samples=tuple(tuple(hand[start : start + micro_batch]) or filler for hand in hands),
        )
        for start in range(0, max(map(len, hands)), micro_batch)
    ]


def _as_filler(draw: SampleDraw) -> SampleDraw:
    return SampleDraw(index=draw.index, epoch=draw.epoch, sigma=draw.sigma, noise_seed=draw.noise_seed, weight=0.0)


def imbalance(steps: Sequence[Step], flops: Mapping[Bucket, float] | Callable[[Bucket], float]) -> float:
    """The share of FLOPs that ranks spend waiting or on fillers: 1 - useful / (ranks x slowest rank), over `steps`."""
    cost = flops if callable(flops) else flops.__getitem__
    useful = spent = 0.0
    for step in steps:
        for micro in step.micro_steps:
            useful += cost(micro.bucket) * sum(draw.weight for hand in micro.samples for draw in hand)
            spent += cost(micro.bucket) * len(micro.samples) * max(map(len, micro.samples))
    return 1 - useful / spent
