"""The schedule of a run: which samples an optimizer step has and everything random about them. Pure, torch-free.

A step is a function of (seed, step) alone. How its samples fall on ranks is worked out from it afterwards, so the
loss does not depend on the layout, and a run can be resumed at any step on any number of ranks.

An ordinary step has a global batch of one bucket and one expert, so every rank does the same work. What is left of
each bucket at the end of an epoch (its size modulo the batch) forms mixed steps, which run as several micro-steps; a
rank without work in one of them runs a copy of a sample with weight 0, as all ranks of a sharded model have to take
part in its collectives.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from wan_accel.models.variants import Expert
from wan_accel.objective import NoiseLevels

NO_KNOWN = -1


class Bucket(NamedTuple):
    """Samples of one shape: frames, and height and width in pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetIndex:
    """What the plan has to know of a dataset: a bucket and the number of cached known variants of every row."""

    buckets: tuple[Bucket, ...]
    num_known: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.buckets) != len(self.num_known):
            raise ValueError(f"{len(self.buckets)} buckets but {len(self.num_known)} known-variant counts")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBudget:
    """A batch of about `tokens` tokens: the samples of a bucket that fit, a multiple of `multiple_of` and at least one.

    num_tokens: tokens of a sample of a bucket, e.g. `Variant.num_tokens`.
    """

    tokens: int
    num_tokens: Callable[[int, int, int], int]
    multiple_of: int = 1

    def samples(self, bucket: Bucket) -> int:
        whole = self.tokens // self.num_tokens(*bucket) // self.multiple_of
        return max(1, whole) * self.multiple_of


BatchSize = int | TokenBudget


def num_samples(size: BatchSize, bucket: Bucket) -> int:
    """Samples of a batch of one bucket."""
    return size if isinstance(size, int) else size.samples(bucket)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDraw:
    """One sample of a step. `weight` is 0 for a filler; `known` is -1 for plain animation without known pixels."""

    index: int
    epoch: int
    sigma: float
    noise_seed: int
    drop_caption: bool = False
    drop_face: bool = False
    drop_image: bool = False
    known: int = NO_KNOWN
    weight: float = 1.0

    @property
    def timestep(self) -> float:
        return 1000.0 * self.sigma


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """One forward and backward of every rank: `samples[data rank]` is never empty."""

    bucket: Bucket
    expert: str
    samples: tuple[tuple[SampleDraw, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An optimizer step: `num_samples` true samples over all ranks."""

    step: int
    epoch: int
    num_samples: int
    micro_steps: tuple[MicroStep, ...]

    @property
    def samples_of(self) -> Counter[str]:
        """True samples over all ranks of each expert."""
        counts: Counter[str] = Counter()
        for micro in self.micro_steps:
            counts[micro.expert] += sum(draw.weight > 0 for hand in micro.samples for draw in hand)
        return counts


# Samples of one bucket and expert.
Group = tuple[tuple[Bucket, str], np.ndarray]

# Purposes of random numbers: one stream each, so that adding a draw never changes another.
_ORDER, _STEP_ORDER, _SIGMA, _NOISE, _CAPTION, _FACE, _KNOWN, _SPLIT, _FIXED, _IMAGE, _MIXTURE = range(11)


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of uint64 that spreads every bit."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _hash(seed: int, purpose: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """uint64 for each item: the same on every platform, without a state to replay."""
    key = np.zeros((), dtype=np.uint64)
    for part in (seed, purpose, epoch):
        key = _mix(key ^ np.uint64(part % 2**64))
    return _mix(_mix(items.astype(np.uint64)) ^ key)


def _uniform(seed: int, purpose: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1) with 53 random bits."""
    return (_hash(seed, purpose, epoch, items) >> np.uint64(11)).astype(np.float64) / 2**53


def shuffled(rows: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """Rows in an order fixed by (seed, number): the passes of a mixture over a dataset."""
    return rows[np.argsort(_hash(seed, _MIXTURE, number, rows), kind="stable")]


class EpochItems(Protocol):
    """What an epoch is made of where that is not every row once: `Mixture`. Item i is row i % (rows of the index)."""

    def of(self, epoch: int) -> np.ndarray:
        """The items of an epoch, as many as there are rows to train on, each once."""


class StepPlan:
    """The schedule of a run.

    Args:
        index: the dataset.
        seed: of everything random.
        global_batch: samples of an optimizer step, or tokens.
        micro_batch: samples that a rank runs at once, or tokens.
        levels: the density of sigma; its range is replaced by the experts'.
        experts: the experts trained in this run; with two, a sample belongs to the one whose range holds its sigma.
        caption_dropout, face_dropout: probabilities.
        rows: rows to train on; all by default (validation rows are left out here).
        mixture: which of them an epoch has, and how often; each once by default.

    Raises:
        ValueError: no rows, or a batch below 1.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        seed: int,
        global_batch: BatchSize,
        micro_batch: BatchSize = 1,
        levels: NoiseLevels | None = None,
        experts: Sequence[Expert] = (Expert(name="default"),),
        caption_dropout: float = 0.0,
        face_dropout: float = 0.0,
        image_dropout: float = 0.0,
        rows: Sequence[int] | None = None,
        mixture: EpochItems | None = None,
    ) -> None:
        self.index = index
        self.mixture = mixture
        self.rows = np.arange(len(index.buckets)) if rows is None else np.asarray(sorted(rows), dtype=np.int64)
        if len(self.rows) == 0:
            raise ValueError("the training split has no rows: lower data.eval.fraction or add clips")
        for name, size in (("global_batch", global_batch), ("micro_batch", micro_batch)):
            if (size if isinstance(size, int) else size.tokens) < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.experts = tuple(sorted(experts, key=lambda expert: expert.sigma_min))
        low, high = min(e.sigma_min for e in experts), max(e.sigma_max for e in experts)
        levels = levels or NoiseLevels()
        self.levels = NoiseLevels(
            density=levels.density, shift=levels.shift, logit_mean=levels.logit_mean, logit_std=levels.logit_std,
            mode_scale=levels.mode_scale, sigma_min=low, sigma_max=high,
        )  # fmt: skip
        self.caption_dropout = caption_dropout
        self.face_dropout = face_dropout
        self.image_dropout = image_dropout
        # Shares of uniform draws below which a sample belongs to the first expert, the first two, ...
        span = (self.levels.share_below(low), self.levels.share_below(high))
        shares = [self.levels.share_below(expert.sigma_min) for expert in self.experts[1:]]
        self._cuts = np.asarray([(share - span[0]) / (span[1] - span[0]) for share in shares])
        self._kinds = sorted({index.buckets[row] for row in self.rows.tolist()})
        numbers = {bucket: number for number, bucket in enumerate(self._kinds)}
        self._bucket_numbers = np.zeros(len(index.buckets), dtype=np.int64)
        self._bucket_numbers[self.rows] = [numbers[index.buckets[row]] for row in self.rows.tolist()]
        self._epochs: dict[int, list[list[Group]]] = {}
        self._starts = [0]  # first step of each epoch so far

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch. Later ones have as many, but for a pair under a token budget."""
        return self.start_of(1)

    @property
    def num_shapes(self) -> int:
        """Shapes that a micro-batch can have: every bucket, in every number of samples up to its micro-batch."""
        return sum(num_samples(self.micro_batch, bucket) for bucket in self._kinds)

    def start_of(self, epoch: int) -> int:
        """The first optimizer step of an epoch."""
        if isinstance(self.global_batch, int):
            return epoch * -(-len(self.rows) // self.global_batch)
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._plan_epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of an optimizer step and its place in it, from 0."""
        if isinstance(self.global_batch, int):
            return divmod(step, self.steps_per_epoch)
        epoch = 0
        while self.start_of(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.start_of(epoch)

    def epochs_at(self, step: int) -> float:
        """Epochs that are done after `step` optimizer steps."""
        epoch, position = self.locate(step)
        return epoch + position / (self.start_of(epoch + 1) - self.start_of(epoch))

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of a number of epochs, rounded up."""
        whole = int(epochs)
        return self.start_of(whole) + math.ceil(
            (epochs - whole) * (self.start_of(whole + 1) - self.start_of(whole))
        )

    def step(self, step: int, num_data_ranks: int) -> Step:
        """The optimizer step `step` (from 0) on `num_data_ranks` ranks."""
        epoch, position = self.locate(step)
        if epoch not in self._epochs:  # a step and the next one may be of two epochs
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: self._plan_epoch(epoch)}
        groups = self._epochs[epoch][position]
        micro_steps: list[MicroStep] = []
        first_rank = 0
        for (bucket, expert), rows in groups:
            draws = [self._draw(int(row), epoch) for row in rows]
            micro_batch = num_samples(self.micro_batch, bucket)
            micro_steps += _deal(bucket, expert, draws, num_data_ranks, micro_batch, first_rank)
            first_rank += len(draws)  # the next group goes on where this one stopped, which evens out the tails
        return Step(
            step=step,
            epoch=epoch,
            num_samples=sum(len(rows) for _, rows in groups),
            micro_steps=tuple(micro_steps),
        )

    def _plan_epoch(self, epoch: int) -> list[list[Group]]:
        """Every step of an epoch as groups of rows, before they are dealt to ranks."""
        items = self.rows if self.mixture is None else self.mixture.of(epoch)
        order = np.argsort(_hash(self.seed, _ORDER, epoch, items), kind="stable")
        # Groups in the order of (bucket, expert name), rows in the order of the epoch.
        names = sorted(expert.name for expert in self.experts)
        owners = np.asarray([names.index(expert.name) for expert in self.experts])[self._owners(items, epoch)]
        keys = (self._bucket_numbers[items % len(self.index.buckets)] * len(names) + owners)[order]
        by_key = np.argsort(keys, kind="stable")
        numbers, firsts = np.unique(keys[by_key], return_index=True)
        steps: list[list[Group]] = []
        tail: list[Group] = []
        for number, rows in zip(numbers.tolist(), np.split(items[order][by_key], firsts[1:])):
            key = (self._kinds[number // len(names)], names[number % len(names)])
            size = num_samples(self.global_batch, key[0])
            full = len(rows) // size * size
            steps += [[(key, batch)] for batch in rows[:full].reshape(-1, size)]
            tail.append((key, rows[full:]))
        steps += _pack(tail, self.global_batch)
        shuffled = np.argsort(_hash(self.seed, _STEP_ORDER, epoch, np.arange(len(steps))), kind="stable")
        return [steps[i] for i in shuffled]

    def _owners(self, items: np.ndarray, epoch: int) -> np.ndarray:
        """The position in `experts` of each item's expert."""
        return np.searchsorted(self._cuts, _uniform(self.seed, _SIGMA, epoch, items), side="right")

    def expert_at(self, sigma: float) -> str:
        """The name of the trained expert for a noise level; the only one for any."""
        if len(self.experts) == 1:
            return self.experts[0].name
        return next(expert.name for expert in self.experts if expert.covers(sigma))

    def _sigma(self, item: int, epoch: int) -> float:
        """The sample's noise level, inside the range of the expert that its draw belongs to."""
        u = float(_uniform(self.seed, _SIGMA, epoch, np.asarray(item)))
        expert = self.experts[int(np.searchsorted(self._cuts, u, side="right"))]
        highest = expert.sigma_max if expert.covers(expert.sigma_max) else math.nextafter(expert.sigma_max, 0.0)
        return min(max(self.levels.sample(u), expert.sigma_min), highest)

    def _draw(self, number: int, epoch: int) -> SampleDraw:
        item, row = np.asarray(number), number % len(self.index.buckets)

        def uniform(purpose: int) -> float:
            return float(_uniform(self.seed, purpose, epoch, item))

        num_known = self.index.num_known[row]
        return SampleDraw(
            index=row,
            epoch=epoch,
            sigma=self._sigma(number, epoch),
            noise_seed=int(_hash(self.seed, _NOISE, epoch, item) >> np.uint64(1)),
            drop_caption=uniform(_CAPTION) < self.caption_dropout,
            drop_face=uniform(_FACE) < self.face_dropout,
            drop_image=uniform(_IMAGE) < self.image_dropout,
            known=int(uniform(_KNOWN) * num_known) if num_known else NO_KNOWN,
        )


def _pack(tail: Sequence[Group], global_batch: BatchSize) -> list[list[Group]]:
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


def _deal(
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


def split_groups(group_ids: Sequence[Hashable], *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into training and validation rows without tearing a group (the clips of one source) apart.

    Groups go to validation in an order fixed by (seed, group id) until they hold at least `fraction` of the
    rows; adding rows to a dataset therefore moves few groups. A fraction of 0 gives no validation rows.
    """
    groups: dict[str, list[int]] = {}
    for row, group in enumerate(group_ids):
        groups.setdefault(str(group), []).append(row)
    keys = {name: np.frombuffer(name.encode().ljust(8, b"\0"), dtype=np.uint8) for name in groups}
    order = sorted(groups, key=lambda name: (int(_fold(seed, keys[name])), name))
    evaluation: list[int] = []
    for name in order:
        if len(evaluation) >= fraction * len(group_ids):
            break
        evaluation += groups[name]
    held = set(evaluation)
    return [row for row in range(len(group_ids)) if row not in held], sorted(evaluation)


def _fold(seed: int, data: np.ndarray) -> np.uint64:
    """Hash bytes."""
    key = _hash(seed, _SPLIT, 0, np.asarray(len(data)))
    for byte in data.tolist():
        key = _mix(key ^ np.uint64(byte))
    return key  # type: ignore[return-value]


def fixed_draws(
    index: DatasetIndex, rows: Sequence[int], *, num_sigmas: int, seed: int, expert: Expert | None = None
) -> list[SampleDraw]:
    """Draws for validation: every row at `num_sigmas` evenly spread sigmas, noise fixed, nothing dropped.

    Sigmas are the middles of equal bins of the expert's range, so the mean over them is not dominated by the
    training density.
    """
    low, high = (expert.sigma_min, expert.sigma_max) if expert is not None else (0.0, 1.0)
    draws = []
    for row in rows:
        for level in range(num_sigmas):
            item = np.asarray(row * num_sigmas + level)
            draws.append(
                SampleDraw(
                    index=int(row),
                    epoch=0,
                    sigma=low + (high - low) * (level + 0.5) / num_sigmas,
                    noise_seed=int(_hash(seed, _FIXED, 0, item) >> np.uint64(1)),
                    known=0 if index.num_known[row] else NO_KNOWN,
                )
            )
    return draws
