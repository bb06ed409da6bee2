"""A micro step of a model on fake tensors: the trainer's noising, forward pass, loss and backward pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import Variant
from wan_accel.noising import noise_batch
from wan_accel.objective import Weighting, micro_batch_loss
from wan_accel.plan.memory import TrackMemory


def run_micro_step(
    model: WanDenoiser,
    variant: Variant,
    batch: Mapping[str, Tensor],
    memory: TrackMemory,
    *,
    weighting: Weighting = "none",
    autocast: bool = False,
) -> int:
    """Forward and backward; returns the bytes of activations that are kept in between, the batch's own among them.

    Args:
        model: on fake tensors, sharded or not.
        variant: the row of the variants table.
        batch: fake tensors.
        memory: is active.
        weighting: of the loss.
        autocast: as DDP and one process compute with mixed precision.
    """
    noisy = noise_batch(batch, variant)
    precision: AbstractContextManager = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precision:
        predicted = model(noisy.hidden_states, noisy.timestep, **noisy.conditions)
    _, loss = micro_batch_loss(
        predicted, noisy.target, noisy.loss_mask, sigma=batch["sigma"], weight=batch["weight"], weighting=weighting,
        shift=1.0, num_samples=1, num_data_ranks=1,
    )  # fmt: skip
    kept = memory.live["other"]
    torch.autograd.backward([loss])
    return kept
