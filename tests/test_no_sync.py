"""A training step never waits for the GPU, nor hands it constants: on CPU, the operators that would do so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import GLOBAL_BATCH, SyntheticSource, plan_for, tiny_denoiser
from torch.utils._python_dispatch import TorchDispatchMode

from wan_accel.arguments import WanTrainingArguments
from wan_accel.data.collate import StepDataset
from wan_accel.models.variants import VARIANTS
from wan_accel.trainer import WanTrainer


class NoSync(TorchDispatchMode):
    """Refuses reading a value on the host (`.item()`, a tensor as a condition) and making one there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, "a value is read on the host: the host waits for the GPU"
        assert "lift_fresh" not in name, "a constant is made on the host and copied"
        assert "nonzero" not in name and "is_nonzero" not in name, name
        return func(*args, **(kwargs or {}))


def test_the_mode_notices() -> None:
    with NoSync(), pytest.raises(AssertionError, match="read on the host"):
        torch.ones(3).sum().item()
    with NoSync(), pytest.raises(AssertionError, match="copied"):
        torch.tensor([1.0])


@pytest.mark.parametrize("variant", ["t2v-1.3b", "ti2v-5b", "animate-14b"])
def test_a_step_reads_nothing_on_the_host(variant: str, tmp_path: Path) -> None:
    args = WanTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, global_batch=GLOBAL_BATCH, weighting="bell"
    )  # fmt: skip
    source = SyntheticSource(variant)
    plan = plan_for(source, image_dropout=0.5)  # ti2v: samples with a known first frame and without, two timesteps each
    trainer = WanTrainer(tiny_denoiser(variant), args, source, plan, variant=VARIANTS[variant])
    trainer._prepare_for_training(2, trainer.get_train_dataloader(), None)
    dataset = StepDataset(source, plan, data_rank=0, num_data_ranks=1)
    trainer.training_step(trainer.model, dataset[0])  # fills the RoPE tables of its buckets
    step = dataset[0]
    with NoSync():
        loss = trainer.training_step(trainer.model, step)
        trainer._clip_grad_norm(trainer.model)
    assert torch.isfinite(loss)
