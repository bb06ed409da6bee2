"""Several latents folders as one dataset, each with a share of every epoch."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from wan_accel.data.cells import LatentsError
from wan_accel.data.digest import RowsDigest, join_digests
from wan_accel.data.latents import ClipInfo, LatentsDataset
from wan_accel.draws import DatasetIndex, SampleDraw
from wan_accel.streams import shuffled


class Mixture:
    """The items of an epoch: dataset d gives its share of as many as there are rows. Pure; see `EpochItems`.

    Epochs go on through a dataset where the last one stopped, one shuffled pass after the other, so that each of its
    rows is used as often as the others, once more at most. An epoch is a function of (seed, epoch) alone.

    Args:
        rows: of each dataset, those to train on.
        weights: of each dataset, relative to each other.
        num_rows: of the whole index: item i is row i % num_rows, the copy i // num_rows of it in its epoch.
        seed: of the order of passes.

    Raises:
        ValueError: a dataset without rows, or with a share of less than a row.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], weights: Sequence[float], *, num_rows: int, seed: int
    ) -> None:
        self._rows = [np.asarray(some, dtype=np.int64) for some in rows]
        self._num_rows = num_rows
        self._seed = seed
        self.counts = _shares(weights, sum(map(len, rows)))
        for number, (some, count) in enumerate(zip(rows, self.counts)):
            if not len(some) or not count:
                raise ValueError(
                    f"data.datasets[{number}] has {len(some)} rows to train on and {count} of an epoch's "
                    f"{sum(self.counts)}: raise its weight, or remove it"
                )

    def of(self, epoch: int) -> np.ndarray:
        """The items of an epoch."""
        parts = zip(self._rows, self.counts)
        return np.concatenate([self._of_dataset(rows, count, epoch) for rows, count in parts])

    def _of_dataset(self, rows: np.ndarray, count: int, epoch: int) -> np.ndarray:
        first, last = epoch * count, (epoch + 1) * count  # places in the row of all passes
        first_pass, last_pass = first // len(rows), -(-last // len(rows))
        passes = [
            shuffled(rows, seed=self._seed, number=number) + (number - first_pass) * self._num_rows
            for number in range(first_pass, last_pass)
        ]
        start = first - first_pass * len(rows)
        return np.concatenate(passes)[start : start + count]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Split a number by weights; what is left after rounding down goes to the largest remainders."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


class MixedLatents:
    """Latents folders one after the other, as a source of training samples.

    Args:
        datasets: of one variant; their keys are checked against a recipe's one by one.
        weights: of each; the number of its rows to train on by default.
    """

    def __init__(self, datasets: Sequence[LatentsDataset], weights: Sequence[float] | None = None) -> None:
        self.datasets = list(datasets)
        self.weights = weights
        self._starts = [0, *accumulate(map(len, datasets))]
        self._folders = folder_names([one.root for one in datasets])

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def group_ids(self) -> list[str]:
        """The source of every row; one that is in several folders is the same."""
        return [group for one in self.datasets for group in one.group_ids]

    @property
    def clip_ids(self) -> list[str]:
        return [name for one in self.datasets for name in one.clip_ids]

    @property
    def digest(self) -> RowsDigest:
        """Of the folders in their order, and of their weights."""
        return join_digests([one.digest for one in self.datasets], self.weights)

    @property
    def keys(self) -> dict[str, str]:
        """What the conditions were made with, the same in all folders."""
        return self.datasets[0].keys

    def index(self) -> DatasetIndex:
        """Buckets and known-variant counts of all rows."""
        found = [one.index() for one in self.datasets]
        return DatasetIndex(
            buckets=tuple(bucket for one in found for bucket in one.buckets),
            num_known=tuple(count for one in found for count in one.num_known),
        )

    def check_same_keys(self) -> None:
        """Refuse folders whose conditions were made by different weights or settings, whatever the recipe's.

        Raises:
            LatentsError: names both folders and the fields.
        """
        first = self.datasets[0]
        for other in self.datasets[1:]:
            kinds = sorted(first.keys.keys() | other.keys.keys())
            if differing := [kind for kind in kinds if first.keys.get(kind) != other.keys.get(kind)]:
                raise LatentsError(
                    f"data.datasets: {other.root} and {first.root} differ in {', '.join(differing)}: run "
                    "wan_accel.cache on both with this recipe"
                )

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """See `LatentsDataset.sample`; rows are counted over all folders."""
        number = bisect.bisect_right(self._starts, index) - 1
        return self.datasets[number].sample(index - self._starts[number], draw)

    def clip_info(self, index: int) -> ClipInfo:
        """See `LatentsDataset.clip_info`; the folder is named, as the same clip id may be in two."""
        number = bisect.bisect_right(self._starts, index) - 1
        info = self.datasets[number].clip_info(index - self._starts[number])
        return replace(info, folder=self._folders[number])

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `LatentsDataset.unconditional`; the nulls of all folders are the same, as their keys are."""
        return self.datasets[0].unconditional(inputs)

    def mixture(self, rows: Sequence[int], *, seed: int) -> Mixture:
        """What epochs over `rows` are made of."""
        split: list[list[int]] = [[] for _ in self.datasets]
        for row in rows:
            split[bisect.bisect_right(self._starts, row) - 1].append(row)
        weights = [float(len(part)) for part in split] if self.weights is None else self.weights
        return Mixture(split, weights, num_rows=len(self), seed=seed)


def folder_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart; none of a single one."""
    paths = [folder.resolve().parts for folder in folders]
    names = [""] * len(paths)
    for count in range(1, max(map(len, paths)) + 1):
        if len(set(names)) == len(paths):
            break
        names = ["/".join(parts[-count:]) for parts in paths]
    return names
