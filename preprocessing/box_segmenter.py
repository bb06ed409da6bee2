"""A small ONNX network that cuts a person out of a box, frame by frame."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import cv2
import numpy as np

from preprocessing.masks import Mask
from preprocessing.onnx_model import NetworkOptions, OnnxModel
from preprocessing.types import Float, Frames, Person, check_frames

_CROP_MARGIN = 1.15
_MASK_PROBABILITY = 0.5


class BoxSegmenter:
    """Segments the person in a box: a network (N, S, S, 3) -> probability (N, S, S, 1)."""

    def __init__(self, onnx_path: str | Path, **options: Unpack[NetworkOptions]) -> None:
        """Open the network; raises ValueError as `OnnxModel` does, or for another kind of network."""
        self._model = OnnxModel(onnx_path, **options)
        shape: tuple[Any, ...] = self._model.input_shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise ValueError(f"{self._model.path}: input {shape}; a person segmenter has input (N, S, S, 3), RGB 0..1")
        self._size = shape[1]

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""
        return self._model.seconds_in_network

    def __call__(self, frames_rgb: Frames, person: Person, others: Sequence[Person] = ()) -> Mask:
        """Return (T, H, W) masks, empty where the box's score is below 0; others play no part."""
        check_frames(frames_rgb)
        masks = np.zeros(frames_rgb.shape[:3], bool)
        present = np.flatnonzero(person.boxes_xyxys[:, 4] > 0)
        step = self._model.batch_frames
        batches = [present[start : start + step].tolist() for start in range(0, len(present), step)]
        for _ in self._model.side_by_side(partial(self._segment, masks, frames_rgb, person.boxes_xyxys), batches):
            pass
        return masks

    def _segment(self, masks: Mask, frames_rgb: Frames, boxes_xyxys: Float, batch: list[int]) -> None:
        """Fill masks from squares around the boxes; the network sees black outside the frame."""
        maps = [self._to_crop(boxes_xyxys[frame]) for frame in batch]
        size = self._size, self._size
        pixels = np.empty((len(batch), *size, 3), np.float32)
        for place, frame, to_crop in zip(pixels, batch, maps):
            crop = cv2.warpAffine(frames_rgb[frame], to_crop, size, flags=cv2.INTER_LINEAR)
            np.divide(crop, np.float32(255), out=place)
        for frame, to_crop, probability in zip(batch, maps, self._model.run(pixels)):
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            back = cv2.warpAffine(probability[..., 0], to_crop, masks.shape[:0:-1], flags=flags)
            np.greater(back, _MASK_PROBABILITY, out=masks[frame])

    def _to_crop(self, box_xyxys: Float) -> Float:
        """(2, 3) map from frame to crop; centres of pixels map onto centres: u + 0.5 = (x + 0.5 - corner) * gain."""
        side = max(float(np.max(box_xyxys[2:4] - box_xyxys[:2])) * _CROP_MARGIN, 1.0)
        corner = (box_xyxys[:2] + box_xyxys[2:4] - side) / 2
        gain = self._size / side
        offset = (0.5 - corner) * gain - 0.5
        return np.array([[gain, 0, offset[0]], [0, gain, offset[1]]])
