"""The data loader of a run: its items are optimizer steps, from where the run stands to its end."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader, Sampler

from wan_accel.data.collate import StepDataset, share_memory

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


def step_loader(trainer: "WanTrainer") -> DataLoader:
    """One item an optimizer step of this data rank."""
    dataset = StepDataset(
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
