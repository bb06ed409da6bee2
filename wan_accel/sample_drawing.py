"""Draw latents from a trainer's live weights, on every rank together."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from wan_accel.data.collate import SampleSource, collate
from wan_accel.draws import DatasetIndex, SampleDraw
from wan_accel.held_out import fixed_draws
from wan_accel.noising import impose_known
from wan_accel.recipe.schema import SampleVideos
from wan_accel.sample_schedule import drawn_sigmas
from wan_accel.sampling import Velocity, sample_latents
from wan_accel.validation import share

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer


class GuidedSource(SampleSource, Protocol):
    """Cached conditions that guidance can be computed against."""

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a micro-batch without what guidance is to strengthen."""


def sample_draws(index: DatasetIndex, rows: Sequence[int], *, seed: int) -> list[SampleDraw]:
    """One draw a row with fixed noise and nothing dropped: the same videos, step after step, from better weights."""
    return [dataclasses.replace(draw, sigma=1.0) for draw in fixed_draws(index, rows, num_sigmas=1, seed=seed)]


def draw_share(trainer: "WanTrainer", draws: Sequence[SampleDraw], settings: SampleVideos) -> dict[int, Tensor]:
    """Draw this data rank's clips. Every rank calls it and runs the same number of forwards.

    Returns:
        Position in `draws` -> latents (C, F, h, w) fp32 on the CPU, without the reference slot.
    """
    source: GuidedSource = trainer.source  # type: ignore[assignment]
    sigmas = drawn_sigmas(settings.num_steps, trainer.variant.shift, trainer.plan.experts)
    velocity, device, drawn = velocity_of(trainer), trainer.accelerator.device, {}
    shares = list(share(range(len(draws)), trainer.data_rank, trainer.dims.num_data_ranks))
    bar = tqdm(
        total=len(shares) * (len(sigmas) - 1), desc="videos", leave=False,
        disable=bool(trainer.args.disable_tqdm) or not trainer.is_world_process_zero(),
    )
    with trainer.evaluating(), bar:
        for position, counts in shares:
            batch = _on(device, collate(source, [draws[position]]))
            null = source.unconditional(batch) if settings.guidance != 1.0 else {}
            latents = sample_latents(
                velocity,
                batch,
                sigmas=sigmas,
                guidance=settings.guidance,
                unconditional=_on(device, null) or None,
                impose_known=partial(impose_known, batch=batch, variant=trainer.variant),
                on_step=bar.update,
            )
            if counts:
                drawn[position] = latents[0, :, trainer.variant.reference_frames :].cpu()
    return drawn


def _on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def velocity_of(trainer: "WanTrainer") -> Velocity:
    """The velocity by the live weights of whichever trained expert a noise level belongs to."""

    def velocity(noisy: Tensor, sigma: float, inputs: Mapping[str, Tensor]) -> Tensor:
        level = noisy.new_full((len(noisy),), sigma)
        return trainer.denoise(trainer.plan.expert_at(sigma), noisy, level, inputs)

    return velocity


def gather(mine: dict[int, Tensor] | str) -> dict[int, Tensor] | str:
    """What every rank has drawn, or the first rank's error if one has failed. Collective over all ranks."""
    if not dist.is_initialized():
        return mine
    everyone: list[dict[int, Tensor] | str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    errors = [part for part in everyone if isinstance(part, str)]
    return errors[0] if errors else {at: latents for part in everyone for at, latents in part.items()}  # type: ignore[union-attr]
