"""From the step plan to tensors: one dataset item an optimizer step, holding this rank's micro-batches."""

import gc
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from wan_accel.draws import DatasetIndex, MicroStep, SampleDraw
from wan_accel.step_plan import StepPlan

MicroBatch = dict[str, Tensor]
_PADDED = {"text", "live_caption"}  # of different lengths within a bucket


class SampleError(ValueError):
    """A sample that cannot be read, or does not fit the others of its micro-batch; the message names it."""


class SampleSource(Protocol):
    """Cached conditions that can be drawn from, e.g. `LatentsDataset`."""

    @property
    def keys(self) -> dict[str, str]:
        """What the conditions were made with, recorded with a run."""

    def index(self) -> DatasetIndex:
        """What the step plan has to know of every sample."""

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """The tensors of one sample without a batch dim: `latents`, `noise`, `text` and other denoiser inputs."""


class StepDataset(Dataset):
    """Maps an optimizer step to this data rank's share of it.

    An item is {"step": int, "num_samples": int (of all ranks), "micro_batches": [MicroBatch], "experts": [str] (of
    each micro-batch), "samples_of": {expert: number of its samples over all ranks}}.
    """

    def __init__(self, source: SampleSource, plan: StepPlan, *, data_rank: int, num_data_ranks: int) -> None:
        self.source = source
        self.plan = plan
        self.data_rank = data_rank
        self.num_data_ranks = num_data_ranks

    def __getitem__(self, step: int) -> dict[str, Any]:
        planned = self.plan.step(step, self.num_data_ranks)
        return {
            "step": step,
            "num_samples": planned.num_samples,
            "samples_of": dict(planned.samples_of),
            "experts": [micro.expert for micro in planned.micro_steps],
            "micro_batches": [self._micro_batch(micro) for micro in planned.micro_steps],
        }

    def _micro_batch(self, micro: MicroStep) -> MicroBatch:
        return collate(self.source, micro.samples[self.data_rank])


def share_memory(worker: int) -> None:
    """In a new worker: never collect what it has from its parent, with which it shares the memory (fork).

    A collection writes to every object that it looks at, and the system copies a page that is written to: at a million
    rows the plan's tuples are 140 MiB in every worker of every rank.
    """
    gc.freeze()


def collate(source: SampleSource, draws: Sequence[SampleDraw]) -> MicroBatch:
    """Read and stack the samples of a micro-step; texts are zero-padded to the longest.

    Adds `sigma` (B,) and `weight` (B,) fp32, and `drop_image` (B,) bool.

    Raises:
        SampleError: a sample cannot be read, or samples of one bucket differ in a shape; the message names both rows.
    """
    try:
        samples = [source.sample(draw.index, draw) for draw in draws]
    except (ValueError, OSError) as error:
        raise SampleError(str(error)) from error
    for name in _PADDED & samples[0].keys():
        longest = max(sample[name].shape[0] for sample in samples)
        for sample in samples:
            value = sample[name]
            sample[name] = F.pad(value, (0, 0) * (value.ndim - 1) + (0, longest - value.shape[0]))
    batch = {name: _stack(name, samples, draws) for name in samples[0]}
    batch["sigma"] = torch.tensor([draw.sigma for draw in draws], dtype=torch.float32)
    batch["weight"] = torch.tensor([draw.weight for draw in draws], dtype=torch.float32)
    batch["drop_image"] = torch.tensor([draw.drop_image for draw in draws])
    return batch


def _stack(name: str, samples: Sequence[dict[str, Tensor]], draws: Sequence[SampleDraw]) -> Tensor:
    first = samples[0][name].shape
    for sample, draw in zip(samples, draws):
        if name not in sample or sample[name].shape != first:
            found = tuple(sample[name].shape) if name in sample else "nothing"
            raise SampleError(
                f"row {draw.index} has {name} of shape {found}, but row {draws[0].index} of the same bucket has "
                f"{tuple(first)}: one of them was written by something else; encode into a new data.latents folder"
            )
    return torch.stack([sample[name] for sample in samples])
