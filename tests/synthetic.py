"""A small denoiser and made-up cached conditions, equal in every process."""

from collections.abc import Mapping
from typing import Any

import torch

from wan_accel.draws import Bucket, DatasetIndex, SampleDraw
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import VARIANTS, DitSize
from wan_accel.objective import NoiseLevels
from wan_accel.step_plan import StepPlan

# Latent frames, height and width: 18 and 27 tokens, with Animate's reference slot 27 and 36. Ulysses degrees 2 and 4
# leave the last rank with padding in one bucket at least, and cut frames of 9 tokens in two.
LATENTS = ((2, 6, 6), (3, 6, 6))
NUM_ROWS = 10
GLOBAL_BATCH = 4


def bucket_of(variant: str, latents: tuple[int, int, int]) -> Bucket:
    """The pixels whose latents have that shape."""
    stride_t, stride_h, stride_w = VARIANTS[variant].vae.stride
    return Bucket((latents[0] - 1) * stride_t + 1, latents[1] * stride_h, latents[2] * stride_w)


def tiny_denoiser(variant: str) -> WanDenoiser:
    """96 wide, 8 heads; 2 blocks, 6 (two face blocks) for Animate. Random weights, the same everywhere."""
    torch.manual_seed(0)
    row = VARIANTS[variant]
    animate = row.has_animate_adapter
    size = DitSize(
        dim=96, ffn_dim=128, num_layers=6 if animate else 2, num_heads=8, in_dim=row.dit.in_dim,
        out_dim=row.dit.out_dim, freq_dim=32, text_dim=24, clip_dim=40 if animate else None,
    )  # fmt: skip
    adapter = None
    if animate:
        adapter = build_animate_adapter(
            AnimateSize(
                dim=96, num_heads=8, num_face_blocks=2, motion_channels=(2,) * 8, motion_dim=16, face_width=8
            )
        )
    model = WanDenoiser(build_dit(size), adapter, text_length=16)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)
    return model


class SyntheticSource:
    """Cached conditions drawn from the row's number: two buckets, texts of different length."""

    def __init__(self, variant: str) -> None:
        self.animate = VARIANTS[variant].has_animate_adapter
        self.channels = VARIANTS[variant].vae.latent_channels
        self.latents = tuple(LATENTS[row % 3 == 2] for row in range(NUM_ROWS))
        self.buckets = tuple(bucket_of(variant, latents) for latents in self.latents)

    @property
    def keys(self) -> dict[str, str]:
        return {}

    def index(self) -> DatasetIndex:
        return DatasetIndex(buckets=self.buckets, num_known=(0,) * NUM_ROWS)

    def sample(self, index: int, draw: SampleDraw) -> dict[str, torch.Tensor]:
        data = torch.Generator().manual_seed(index)
        frames, height, width = self.latents[index]
        frames += self.animate

        def rand(*shape: int, generator: torch.Generator = data) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        sample = {"latents": rand(self.channels, frames, height, width), "text": rand(3 + index, 24)}
        noise = torch.Generator().manual_seed(draw.noise_seed)
        sample["noise"] = rand(self.channels, frames, height, width, generator=noise)
        if self.animate:
            sample |= {
                "condition": rand(20, frames, height, width), "clip_features": rand(257, 40),
                "pose_latents": rand(16, frames - 1, height, width),
                "motion_vectors": rand(self.buckets[index].num_frames, 16),
            }  # fmt: skip
            if draw.drop_face:
                sample["motion_vectors"] = torch.full_like(sample["motion_vectors"][:1], 0.5).expand_as(
                    sample["motion_vectors"]
                )
        return sample

    def unconditional(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**inputs, "text": torch.ones(len(inputs["text"]), 2, 24)}


def plan_for(
    source: SyntheticSource, global_batch: int = GLOBAL_BATCH, *, seed: int = 7, **options: Any
) -> StepPlan:
    return StepPlan(source.index(), seed=seed, global_batch=global_batch, levels=NoiseLevels(), **options)
