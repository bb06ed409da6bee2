"""The schedule of a run: which samples an optimizer step has and everything random about them. Pure, torch-free.

A step is a function of (seed, step) alone. How its samples fall on ranks is worked out from it afterwards, so the
loss does not depend on the layout, and a run can be resumed at any step on any number of ranks.

An ordinary step has a global batch of one bucket and one expert, so every rank does the same work. What is left of
each bucket at the end of an epoch (its size modulo the batch) forms mixed steps, which run as several micro-steps; a
rank without work in one of them runs a copy of a sample with weight 0, as all ranks of a sharded model have to take
part in its collectives.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wan_accel.dealing import Group, deal, pack
from wan_accel.draws import NO_KNOWN, BatchSize, DatasetIndex, MicroStep, SampleDraw, Step, num_samples
from wan_accel.models.variants import Expert
from wan_accel.objective import NoiseLevels
from wan_accel.streams import Stream, hash_items, uniform


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
            micro_steps += deal(bucket, expert, draws, num_data_ranks, micro_batch, first_rank)
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
        order = np.argsort(hash_items(self.seed, Stream.ORDER, epoch, items), kind="stable")
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
        steps += pack(tail, self.global_batch)
        shuffled = np.argsort(hash_items(self.seed, Stream.STEP_ORDER, epoch, np.arange(len(steps))), kind="stable")
        return [steps[i] for i in shuffled]

    def _owners(self, items: np.ndarray, epoch: int) -> np.ndarray:
        """The position in `experts` of each item's expert."""
        return np.searchsorted(self._cuts, uniform(self.seed, Stream.SIGMA, epoch, items), side="right")

    def expert_at(self, sigma: float) -> str:
        """The name of the trained expert for a noise level; the only one for any."""
        if len(self.experts) == 1:
            return self.experts[0].name
        return next(expert.name for expert in self.experts if expert.covers(sigma))

    def _sigma(self, item: int, epoch: int) -> float:
        """The sample's noise level, inside the range of the expert that its draw belongs to."""
        u = float(uniform(self.seed, Stream.SIGMA, epoch, np.asarray(item)))
        expert = self.experts[int(np.searchsorted(self._cuts, u, side="right"))]
        highest = expert.sigma_max if expert.covers(expert.sigma_max) else math.nextafter(expert.sigma_max, 0.0)
        return min(max(self.levels.sample(u), expert.sigma_min), highest)

    def _draw(self, number: int, epoch: int) -> SampleDraw:
        item, row = np.asarray(number), number % len(self.index.buckets)

        def drawn(purpose: Stream) -> float:
            return float(uniform(self.seed, purpose, epoch, item))

        num_known = self.index.num_known[row]
        return SampleDraw(
            index=row,
            epoch=epoch,
            sigma=self._sigma(number, epoch),
            noise_seed=int(hash_items(self.seed, Stream.NOISE, epoch, item) >> np.uint64(1)),
            drop_caption=drawn(Stream.CAPTION) < self.caption_dropout,
            drop_face=drawn(Stream.FACE) < self.face_dropout,
            drop_image=drawn(Stream.IMAGE) < self.image_dropout,
            known=int(drawn(Stream.KNOWN) * num_known) if num_known else NO_KNOWN,
        )
