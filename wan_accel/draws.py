"""What an optimizer step consists of: samples, everything random about them, and how they fall on ranks. Torch-free."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wan_accel.listing import first_few

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


def describe_buckets(buckets: Sequence[Bucket], num_tokens: Callable[[int, int, int], int]) -> str:
    """How many rows there are of each shape, the one with most tokens first: it decides whether a run fits."""
    counts = Counter(buckets)
    ordered = sorted(counts, key=lambda bucket: num_tokens(*bucket), reverse=True)
    shown = [f"{b.num_frames} frames of {b.height}x{b.width}: {counts[b]}" for b in ordered]
    return f"{len(buckets)} rows in {len(counts)} buckets ({first_few(shown, 5)})"


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
