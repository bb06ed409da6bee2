"""Animate's conditions: the known-pixel video, its mask, and how they join the noisy latents. Pure.

Shapes: T video frames, F = (T - 1) / 4 + 1 latent frames, H x W pixels, h x w latent pixels. Pixels are RGB in
[-1, 1] = uint8 / 127.5 - 1. Source of the conventions: wan/animate.py (`get_i2v_mask`, `generate`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_accel.data.masks import block_augment, dilate

Mode = Literal["animation", "replacement"]
FRAMES_PER_LATENT = 4
NUM_MASK_CHANNELS = 4
GUIDANCE_FRAMES = (0, 1, 5)  # previous frames that a later segment is generated from
# Ranges that a variant's mask is drawn from; the original always takes kernel 7, 3 iterations, one cell.
_KERNELS, _ITERATIONS, _CELLS = (3, 5, 7, 9), (1, 5), (1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownVariant:
    """What is known of a clip before it is generated.

    mode: `animation` knows nothing but guidance frames; `replacement` knows the background.
    guidance_frames: leading frames that are known whole.
    mask_kernel, mask_iterations: dilation of the person's mask in pixels; mask_columns x mask_rows cells of its
        bounding box are filled (`block_augment`).
    """

    mode: Mode
    guidance_frames: int = 0
    mask_kernel: int = 0
    mask_iterations: int = 0
    mask_columns: int = 0
    mask_rows: int = 0

    @property
    def is_plain(self) -> bool:
        """Nothing is known: the same latents for every clip of a shape."""
        return self.mode == "animation" and self.guidance_frames == 0


def draw_known_variant(rng: np.random.Generator, modes: list[str], num_frames: int) -> KnownVariant:
    """Draw a variant uniformly over the clip's modes, guidance lengths that fit, and mask parameters."""
    mode = modes[int(rng.integers(len(modes)))]
    guidance = int(rng.choice([length for length in GUIDANCE_FRAMES if length < num_frames]))
    if mode == "animation":
        return KnownVariant(mode="animation", guidance_frames=guidance)
    return KnownVariant(
        mode="replacement",
        guidance_frames=guidance,
        mask_kernel=int(rng.choice(_KERNELS)),
        mask_iterations=int(rng.integers(_ITERATIONS[0], _ITERATIONS[1] + 1)),
        mask_columns=int(rng.integers(_CELLS[0], _CELLS[1] + 1)),
        mask_rows=int(rng.integers(_CELLS[0], _CELLS[1] + 1)),
    )


def to_pixels(frames_rgb: np.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (3, T, H, W) fp32 in [-1, 1]."""
    return torch.tensor(frames_rgb).permute(3, 0, 1, 2).float() / 127.5 - 1


def grow_mask(mask: np.ndarray, variant: KnownVariant) -> np.ndarray:
    """The person's mask (T, H, W) as a replacement variant hides it."""
    grown = dilate(mask, kernel_pixels=variant.mask_kernel, iterations=variant.mask_iterations)
    cells = {"num_columns": variant.mask_columns, "num_rows": variant.mask_rows}
    return np.stack([block_augment(frame, **cells) for frame in grown])


def known_pixels(frames: Tensor, grown_mask: np.ndarray | None, variant: KnownVariant) -> Tensor:
    """The known-pixel video (3, T, H, W).

    Animation: guidance frames, then zeros, which is mid grey. Replacement: the frames with hidden pixels black
    (-1), guidance frames whole.
    """
    if variant.mode == "animation":
        known = torch.zeros_like(frames)
    else:
        assert grown_mask is not None
        known = torch.where(torch.from_numpy(grown_mask)[None], -1.0, frames)
    known[:, : variant.guidance_frames] = frames[:, : variant.guidance_frames]
    return known


def known_mask(
    grown_mask: np.ndarray | None, variant: KnownVariant, num_frames: int, latent_hw: tuple[int, int]
) -> Tensor:
    """The mask channels (4, F, h, w): 1 = known. `grown_mask` (T, H, W) is 1 where pixels are hidden."""
    if variant.mode == "animation":
        known = torch.zeros(num_frames, *latent_hw)
    else:
        assert grown_mask is not None
        visible = torch.from_numpy(1.0 - grown_mask.astype(np.float32))
        known = F.interpolate(visible[None], size=latent_hw, mode="nearest")[0]
    return pack_mask_frames(known, variant.guidance_frames)


def pack_mask_frames(known: Tensor, guidance_frames: int) -> Tensor:
    """(T, h, w) -> (4, F, h, w): guidance frames set to 1, frame 0 counted four times, four frames a latent one."""
    known = known.clone()
    known[:guidance_frames] = 1
    frames = torch.cat([known[:1].expand(FRAMES_PER_LATENT - 1, -1, -1), known])
    return frames.unflatten(0, (-1, FRAMES_PER_LATENT)).transpose(0, 1)


def join_condition(reference_latents: Tensor, mask: Tensor, known_latents: Tensor) -> Tensor:
    """The condition y (4 + C, F + 1, h, w): the reference slot, known whole, then the clip's known latents.

    Args:
        reference_latents: (C, 1, h, w).
        mask: (4, F, h, w), 1 = known.
        known_latents: (C, F, h, w).
    """
    reference = torch.cat(
        [reference_latents.new_ones(NUM_MASK_CHANNELS, *reference_latents.shape[1:]), reference_latents]
    )
    return torch.cat([reference, torch.cat([mask.to(known_latents.dtype), known_latents])], dim=1)
