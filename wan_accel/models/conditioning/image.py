"""The first frame as a condition: joined to the channels of the noisy latents, or standing in them. Pure.

Shapes: B batch, C latent channels, T video frames, F latent frames, h x w latent pixels.
Joined (i2v): the frame followed by grey, through the VAE, behind a mask (wan/image2video.py, `generate`).
Fused (ti2v): the frame's own latents as latent frame 0, at timestep 0 (wan/textimage2video.py, `i2v`).
"""

import torch
from torch import Tensor

from wan_accel.models.conditioning.animate import NUM_MASK_CHANNELS


def first_frame_pixels(frames: Tensor) -> Tensor:
    """(3, T, H, W) in [-1, 1] -> the first frame, then zeros, which is mid grey."""
    pixels = torch.zeros_like(frames)
    pixels[:, :1] = frames[:, :1]
    return pixels


def join_first_frame(image_latents: Tensor) -> Tensor:
    """The condition (4 + C, F, h, w): a mask that is 1 in frame 0 and 0 behind it, then the latents.

    Args:
        image_latents: (C, F, h, w) of `first_frame_pixels`.
    """
    mask = image_latents.new_zeros(NUM_MASK_CHANNELS, *image_latents.shape[1:])
    mask[:, 0] = 1
    return torch.cat([mask, image_latents])


def fuse_first_frame(noisy: Tensor, latents: Tensor, is_known: Tensor) -> Tensor:
    """Noisy latents with the clean latent frame 0 in the samples where the first frame is known.

    The VAE is causal and takes the first frame by itself: latent frame 0 of a video is that of its first frame.

    Args:
        noisy, latents: (B, C, F, h, w).
        is_known: (B,) bool.
    """
    first = torch.where(is_known.view(-1, 1, 1, 1, 1), latents[:, :, :1], noisy[:, :, :1])
    return torch.cat([first, noisy[:, :, 1:]], dim=2)


def unknown_frames(num_frames: int, is_known: Tensor) -> Tensor:
    """What is left to predict: (B, 1, F, 1, 1) bool, False for latent frame 0 where the first frame is known."""
    is_first = torch.arange(num_frames, device=is_known.device) == 0
    return ~(is_first & is_known.unsqueeze(1)).view(-1, 1, num_frames, 1, 1)
