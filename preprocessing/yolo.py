"""Detectors of the YOLO family: what their inputs and outputs mean."""

from dataclasses import dataclass

import cv2
import numpy as np

from preprocessing.types import Float, Frames

_STRIDES = (8, 16, 32)
_GRAY = 114  # YOLOX was trained with borders of this value


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Letterbox:
    """Frames brought to a network's size at the top left, the rest grey: `pixels` (T, 3, H, W) float32.

    A point of the network's input divided by `scale` is a point of the frame.
    """

    pixels: Float
    scale: float


def letterbox_bgr(frames_rgb: Frames, input_hw: tuple[int, int]) -> Letterbox:
    """Prepare frames as YOLOX wants them: aspect kept, BGR, 0..255 (YOLOX `preproc`)."""
    height, width = frames_rgb.shape[1:3]
    scale = min(input_hw[0] / height, input_hw[1] / width)
    new_height, new_width = int(height * scale), int(width * scale)
    pixels = np.full((len(frames_rgb), 3, *input_hw), _GRAY, np.float32)
    for target, frame in zip(pixels, frames_rgb, strict=True):
        resized = cv2.resize(frame, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        target[:, :new_height, :new_width] = resized[..., ::-1].transpose(2, 0, 1)
    return Letterbox(pixels=pixels, scale=scale)


def num_cells(input_hw: tuple[int, int]) -> int:
    """Predictions of a detector without anchors: one a cell of each of its three grids."""
    return sum((input_hw[0] // stride) * (input_hw[1] // stride) for stride in _STRIDES)


def rows_from_yolox(output: Float, input_hw: tuple[int, int]) -> Float:
    """Decode YOLOX's raw output (N, cells, 5 + C) to rows (N, cells, 6): x1, y1, x2, y2, score, class, input pixels.

    centre = (offset + cell) * stride; size = exp(log size) * stride; score = objectness * class (arXiv:2107.08430).
    """
    cells, strides = [], []
    for stride in _STRIDES:
        rows, columns = input_hw[0] // stride, input_hw[1] // stride
        cells.append(np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2))
        strides.append(np.full((rows * columns, 1), stride))
    cell_size = np.concatenate(strides)
    center = (output[..., :2] + np.concatenate(cells)) * cell_size
    size = np.exp(output[..., 2:4]) * cell_size
    return _rows(center, size, output[..., 4:5] * output[..., 5:])


def rows_from_yolov8(output: Float) -> Float:
    """Turn YOLOv8's output (N, 4 + C, cells), centre, size and class scores, into rows as `rows_from_yolox` does."""
    values = output.transpose(0, 2, 1)
    return _rows(values[..., :2], values[..., 2:4], values[..., 4:])


def _rows(center: Float, size: Float, scores: Float) -> Float:
    best = scores.argmax(axis=-1)[..., None]
    score = np.take_along_axis(scores, best, axis=-1)
    return np.concatenate([center - size / 2, center + size / 2, score, best], axis=-1)


def rows_from_labelled(boxes: Float, labels: Float) -> Float:
    """Join mmdeploy's two outputs, (N, R, 5) x1, y1, x2, y2, score and (N, R) class, into rows (N, R, 6)."""
    return np.concatenate([boxes, labels[..., None].astype(boxes.dtype)], axis=-1)
