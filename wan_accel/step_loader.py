"""The data loader of a run: its items are optimizer steps, from where the run stands to its end."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Sampler

from wan_accel.data.collate import SampleError, StepDataset, share_memory

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer


class _StepSampler(Sampler):
    """Yields the optimizer steps from where the run stands to its end; it has no length on purpose.

    Trainer reads the state of a checkpoint before it asks for the first batch, so a resumed run starts at its
    step without reading or skipping anything.
    """

    def __init__(self, trainer: "WanTrainer") -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.trainer.state.global_step, self.trainer.args.max_steps))


class _StepItems(StepDataset):
    """Items of which one that cannot be read says why: an exception of a worker arrives as text around its text."""

    def __getitem__(self, step: int) -> dict[str, Any]:
        try:
            return super().__getitem__(step)
        except SampleError as error:
            return {"step": step, "problem": str(error), "traceback": traceback.format_exc()}


def check_items(items: Sequence[Mapping[str, Any]]) -> None:
    """Raise what kept an item of `step_loader` from being read.

    Raises:
        SampleError: names the sample; the worker's traceback is its note.
    """
    for item in items:
        if "problem" in item:
            error = SampleError(item["problem"])
            error.add_note(item["traceback"])
            raise error


def step_loader(trainer: "WanTrainer") -> DataLoader:
    """One item an optimizer step of this data rank."""
    dataset = _StepItems(
        trainer.source if trainer.live is None else trainer.live[0],
        trainer.plan,
        data_rank=trainer.dims.data_rank(trainer.args.process_index),
        num_data_ranks=trainer.dims.num_data_ranks,
    )
    workers = trainer.args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_StepSampler(trainer),
        num_workers=workers,
        worker_init_fn=share_memory,
        persistent_workers=workers > 0,
        prefetch_factor=trainer.args.dataloader_prefetch_factor if workers else None,
        pin_memory=trainer.args.dataloader_pin_memory and trainer.accelerator.device.type == "cuda",
    )
