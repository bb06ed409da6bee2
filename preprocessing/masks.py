"""Person masks: how they are grown, and the background they leave."""

import numpy as np

from preprocessing.types import Frames, check_frames
from wan_accel.data.masks import Mask, block_augment, dilate

__all__ = ["Mask", "blacken", "block_augment", "dilate"]


def blacken(frames_rgb: Frames, mask: Mask) -> Frames:
    """Return the frames with every masked pixel black: the background of replacement mode."""
    check_frames(frames_rgb)
    return np.where(mask[..., None], np.uint8(0), frames_rgb)
