"""A micro-batch to what the denoiser is given, and what its output is compared with. Pure.

Shapes: B batch, C latent channels, F latent frames, h x w latent pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_accel.models.conditioning.image import fuse_first_frame, unknown_frames
from wan_accel.models.variants import Variant
from wan_accel.objective import add_noise, velocity

# Tensors of a micro-batch that are not inputs of the denoiser.
_NOT_INPUTS = ("latents", "noise", "sigma", "weight", "drop_image")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyBatch:
    """A micro-batch at its samples' noise levels.

    hidden_states: (B, C, F, h, w) fp32 noisy latents.
    timestep: (B,) fp32, 1000 * sigma.
    conditions: the denoiser's other inputs by name.
    target: (B, C, F, h, w) fp32, the velocity.
    loss_mask: broadcasts to the target, False where the loss does not look; None for everywhere.
    """

    hidden_states: Tensor
    timestep: Tensor
    conditions: dict[str, Tensor]
    target: Tensor
    loss_mask: Tensor | None = None


def noise_batch(batch: Mapping[str, Tensor], variant: Variant) -> NoisyBatch:
    """Add noise to a micro-batch as `variant` is trained.

    Where the first frame is fused, it is clean, at timestep 0 and out of the loss (DiffSynth's `FlowMatchSFTLoss`),
    but in samples with `drop_image`, which are plain text to video.

    Args:
        batch: as `collate` makes it.
        variant: the row of the variants table.
    """
    latents, noise, sigma = batch["latents"].float(), batch["noise"].float(), batch["sigma"]
    return NoisyBatch(
        hidden_states=impose_known(add_noise(latents, noise, sigma), batch, variant),
        timestep=1000.0 * sigma,
        conditions=conditions_of(batch, sigma, variant),
        target=velocity(latents, noise),
        loss_mask=unknown_frames(latents.shape[2], ~batch["drop_image"]) if variant.fuses_first_frame else None,
    )


def conditions_of(batch: Mapping[str, Tensor], sigma: Tensor, variant: Variant) -> dict[str, Tensor]:
    """The denoiser's inputs beside the noisy latents and the timestep, at noise levels sigma (B,)."""
    conditions = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    if variant.fuses_first_frame:
        conditions["first_frame_timestep"] = torch.where(batch["drop_image"], 1000.0 * sigma, 0.0)
    return conditions


def impose_known(noisy: Tensor, batch: Mapping[str, Tensor], variant: Variant) -> Tensor:
    """Noisy latents with the frames that are given, not generated, in place: the first one, where it is fused."""
    if not variant.fuses_first_frame:
        return noisy
    return fuse_first_frame(noisy, batch["latents"].float(), ~batch["drop_image"])
