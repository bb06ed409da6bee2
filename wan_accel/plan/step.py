"""A micro step of a model: the trainer's noising, forward pass, loss and backward pass, on fake or real tensors."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import Variant
from wan_accel.noising import noise_batch
from wan_accel.objective import Weighting, micro_batch_loss


def run_micro_step(
    model: WanDenoiser,
    variant: Variant,
    batch: Mapping[str, Tensor],
    allocated: Callable[[], int],
    *,
    weighting: Weighting = "none",
    autocast: bool = False,
) -> int:
    """Forward and backward; returns what is allocated in between.

    Args:
        model: sharded or not.
        variant: the row of the variants table.
        batch: as `micro_batch` makes it.
        allocated: tells bytes.
        weighting: of the loss.
        autocast: as DDP and one process compute with mixed precision.
    """
    loss = _loss(model, variant, batch, weighting, autocast)
    kept = allocated()
    torch.autograd.backward([loss])
    return kept


def _loss(
    model: WanDenoiser, variant: Variant, batch: Mapping[str, Tensor], weighting: Weighting, autocast: bool
) -> Tensor:
    """In a function of its own, as in the trainer: what only the forward pass needs is freed here."""
    noisy, device = noise_batch(batch, variant), batch["latents"].device.type
    precision: AbstractContextManager = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
    with precision:
        predicted = model(noisy.hidden_states, noisy.timestep, **noisy.conditions)
    _, loss = micro_batch_loss(
        predicted, noisy.target, noisy.loss_mask, sigma=batch["sigma"], weight=batch["weight"], weighting=weighting,
        shift=1.0, num_samples=1, num_data_ranks=1,
    )  # fmt: skip
    return loss
