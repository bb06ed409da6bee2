"""Person masks: a small segmenter, dilation and block augmentation, and prompts for a video segmenter."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.onnx_model import OnnxModel
from preprocessing.types import WAN, Float, Frames, PoseMetas, PreprocessProfile, check_frames
from wan_accel.data.masks import Mask, block_augment, dilate

__all__ = [
    "Mask", "OnnxPersonSegmenter", "blacken", "block_augment", "dilate", "key_frames", "point_prompts",
    "segmenter_chunks",
]  # fmt: skip

_PROMPT_POINTS = [0, 1, 2, 5, 8, 11, 10, 13]  # nose, neck, shoulders, hips, ankles
_PROMPT_SCORE = 0.5
_CHUNK_FRAMES = 400
_KEY_FRAMES = 4
_CROP_MARGIN = 1.15
_MASK_PROBABILITY = 0.5


def blacken(frames_rgb: Frames, mask: Mask) -> Frames:
    """Return the frames with every masked pixel black: the background of replacement mode."""
    check_frames(frames_rgb)
    return np.where(mask[..., None], np.uint8(0), frames_rgb)


def segmenter_chunks(num_frames: int) -> list[range]:
    """Split a video into the pieces of at most 400 frames that the original segments on their own."""
    return [
        range(start, min(start + _CHUNK_FRAMES, num_frames)) for start in range(0, num_frames, _CHUNK_FRAMES)
    ]


def key_frames(num_frames: int) -> list[int]:
    """Choose the frames of a chunk that get prompts: 1 of up to 4 frames, else 4 to 7, evenly spaced."""
    return list(range(0, num_frames, num_frames // (_KEY_FRAMES if num_frames > _KEY_FRAMES else 1)))


def point_prompts(
    metas: PoseMetas, frames: list[int], *, profile: PreprocessProfile = WAN
) -> list[NDArray[np.int32]]:
    """Return for each of `frames` the pixels (P, 2) x, y to click on, all of them on the person.

    Nose, neck, shoulders, hips and ankles. `upstream` gives all 8 whatever their score and position; `wan`
    those that score 0.5 and lie in the picture.
    """
    points = metas.body[frames][:, _PROMPT_POINTS]
    wh = np.array([metas.width, metas.height])
    xy_pixels = points[..., :2] * wh
    kept = np.ones(points.shape[:2], bool)
    if profile.segmenter_points == "visible_points":
        inside = (xy_pixels >= 0).all(axis=2) & (xy_pixels < wh).all(axis=2)
        kept = (points[..., 2] >= _PROMPT_SCORE) & inside
    return [xy[keep].astype(np.int32) for xy, keep in zip(xy_pixels, kept)]


class OnnxPersonSegmenter:
    """Segments the person in a box, frame by frame: a network (N, S, S, 3) -> probability (N, S, S, 1)."""

    def __init__(self, onnx_path: str | Path, *, provider: str = "cpu", num_threads: int = 1) -> None:
        """Open the network; raises ValueError as `OnnxModel` does, or for another kind of network."""
        self._model = OnnxModel(onnx_path, provider=provider, num_threads=num_threads)
        shape: tuple[Any, ...] = self._model.input_shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise ValueError(
                f"{self._model.path}: input {shape}; a person segmenter has input (N, S, S, 3), RGB 0..1"
            )
        self._size = shape[1]

    def __call__(self, frames_rgb: Frames, boxes_xyxys: Float) -> Mask:
        """Return (T, H, W) masks. boxes_xyxys: (T, 5), score below 0: nobody there, an empty mask."""
        check_frames(frames_rgb)
        masks = np.zeros(frames_rgb.shape[:3], bool)
        for mask, frame, box in zip(masks, frames_rgb, boxes_xyxys, strict=True):
            if box[4] > 0:
                self._segment(mask, frame, box)
        return masks

    def _segment(self, mask: Mask, frame: Frames, box_xyxys: Float) -> None:
        """Fill `mask` from a square around the box; the network sees black outside the frame."""
        side = max(float(np.max(box_xyxys[2:4] - box_xyxys[:2])) * _CROP_MARGIN, 1.0)
        corner = (box_xyxys[:2] + box_xyxys[2:4] - side) / 2
        gain = self._size / side
        # Centres of pixels map onto centres: u + 0.5 = (x + 0.5 - corner) * gain.
        to_crop = np.array([[gain, 0, 0.0], [0, gain, 0.0]])
        to_crop[:, 2] = (0.5 - corner) * gain - 0.5
        crop = cv2.warpAffine(frame, to_crop, (self._size, self._size), flags=cv2.INTER_LINEAR)
        probability = self._model.run((crop / np.float32(255))[None])[0, ..., 0]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        back = cv2.warpAffine(probability, to_crop, (mask.shape[1], mask.shape[0]), flags=flags)
        mask[:] = np.asarray(back) > _MASK_PROBABILITY
