"""People in frames: a YOLOv10-style ONNX detector and the choice of one person."""

from pathlib import Path

import cv2
import numpy as np

from preprocessing.onnx_model import OnnxModel
from preprocessing.types import Float, Frames, check_frames

MIN_SCORE = 0.05  # Wan2.2's; small or back-lit people score no more
_MAX_IOU = 0.5
_PERSON_CLASS = 0
_SIZE_RATIO = 0.4


def detector_input(frames_rgb: Frames, *, hw: tuple[int, int] = (640, 640)) -> Float:
    """Stretch (T, H, W, 3) frames to the network's input (T, 3, *hw): RGB float32 in 0..1."""
    check_frames(frames_rgb)
    resized = [cv2.resize(f, (hw[1], hw[0]), interpolation=cv2.INTER_LINEAR) for f in frames_rgb]
    stacked = np.stack(resized).transpose(0, 3, 1, 2)
    return np.asarray(stacked.astype(np.float32) / np.float32(255))


def decode_people(
    rows: Float, frame_hw: tuple[int, int], *, input_hw: tuple[int, int] = (640, 640)
) -> Float:
    """Turn one frame's detector rows into people, best score first.

    rows: (R, 6) x1, y1, x2, y2 in pixels of the network's input, score, class; unused rows are 0.
    Returns (K, 5) float64 x1, y1, x2, y2, score in pixels of the frame, after non-maximum suppression over
    all classes. As in Wan2.2, corner and size are truncated to whole pixels before it.
    """
    rows = rows[rows[:, 4] >= MIN_SCORE].astype(np.float64)
    scale_xyxy = np.array([frame_hw[1] / input_hw[1], frame_hw[0] / input_hw[0]] * 2)
    x1, y1, x2, y2 = (rows[:, :4] * scale_xyxy).T
    xywh = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).astype(np.int32)
    kept = np.asarray(cv2.dnn.NMSBoxes(xywh.tolist(), rows[:, 4].tolist(), MIN_SCORE, _MAX_IOU), np.int64)
    kept = kept[(rows[kept, 5].astype(np.int64) == _PERSON_CLASS) & (rows[kept, 4] > MIN_SCORE)]
    corner, size = xywh[kept, :2], xywh[kept, 2:]
    return np.concatenate([corner, corner + size, rows[kept, 4:5]], axis=1).astype(np.float64)


def select_person(people: Float, frame_hw: tuple[int, int]) -> Float:
    """Choose the main person of one frame: going down in score, each larger one replaces the choice.

    people: (K, 5) from `decode_people`. A box is passed over where its longer side is below 0.4 times that of
    the choice so far (at first: of anyone). Returns (5,); without people the whole frame with score -1.
    """
    if len(people) == 0:
        return np.array([0, 0, frame_hw[1], frame_hw[0], -1], np.float64)
    sizes = people[:, 2:4] - people[:, :2]
    longer_sides, areas = sizes.max(axis=1), sizes.prod(axis=1)
    best, best_area, longer_side = 0, 0.0, longer_sides.max()
    for i, area in enumerate(areas):
        if area > best_area and longer_sides[i] >= _SIZE_RATIO * longer_side:
            best, best_area, longer_side = i, area, longer_sides[i]
    return np.asarray(people[best])


class PersonDetector:
    """Finds people with a detector whose output is (N, R, 6) rows (see `decode_people`)."""

    def __init__(
        self, onnx_path: str | Path, *, provider: str = "cpu", num_threads: int = 1, batch_frames: int = 8
    ) -> None:
        """Open the network; raises ValueError as `OnnxModel` does, or for another kind of network."""
        self._model = OnnxModel(
            onnx_path, provider=provider, num_threads=num_threads, batch_frames=batch_frames
        )
        shapes = self._model.input_shape, self._model.output_shape
        if len(shapes[0]) != 4 or shapes[0][1] != 3 or len(shapes[1]) != 3 or shapes[1][2] != 6:
            raise ValueError(
                f"{self._model.path}: input {shapes[0]}, output {shapes[1]}; a person detector has input "
                "(N, 3, H, W) and output (N, rows, 6), as YOLOv10 exports"
            )
        height, width = shapes[0][2:]
        self._input_hw = (height, width) if isinstance(height, int) and isinstance(width, int) else (640, 640)

    def rows(self, frames_rgb: Frames) -> Float:
        """Run the network; returns (T, R, 6), still in pixels of its input."""
        step = self._model.batch_frames
        outputs = [
            self._model.run(detector_input(frames_rgb[i : i + step], hw=self._input_hw))
            for i in range(0, len(frames_rgb), step)
        ]
        return np.concatenate(outputs)

    def people(self, frames_rgb: Frames) -> list[Float]:
        """Return everyone in each frame: T arrays (K, 5) of x1, y1, x2, y2, score, pixels of the frame."""
        frame_hw = (frames_rgb.shape[1], frames_rgb.shape[2])
        return [decode_people(rows, frame_hw, input_hw=self._input_hw) for rows in self.rows(frames_rgb)]

    def __call__(self, frames_rgb: Frames) -> Float:
        """Return the main person of each frame: (T, 5) x1, y1, x2, y2, score; a score below 0: nobody."""
        frame_hw = (frames_rgb.shape[1], frames_rgb.shape[2])
        return np.stack([select_person(people, frame_hw) for people in self.people(frames_rgb)])
