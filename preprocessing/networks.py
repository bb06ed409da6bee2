"""Detectors and pose networks of several kinds, told apart by the shapes in their ONNX files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.detection import decode_people, detector_input
from preprocessing.heatmaps import decode_heatmaps
from preprocessing.onnx_model import OnnxModel
from preprocessing.pose import NUM_KEYPOINTS, Crops, crops_of_boxes, pose_input
from preprocessing.simcc import decode_depth, decode_simcc, simcc_input
from preprocessing.types import WAN, Float, Frames, PreprocessProfile
from preprocessing.yolo import letterbox_bgr, num_cells, rows_from_labelled, rows_from_yolov8, rows_from_yolox

Shape = tuple[Any, ...]
_DETECTOR_HW, _POSE_HW = (640, 640), (256, 192)  # of files that leave height and width free
_LEAST_CELL_ROWS = 1000  # YOLOv10 gives a few hundred rows, a grid of cells thousands


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorKind:
    """How a detector is recognised by its outputs' shapes (and input height, width), fed and read.

    keeps_aspect: frames go in with grey borders, BGR 0..255; otherwise stretched, RGB 0..1.
    rows: turns its outputs into (N, R, 6) x1, y1, x2, y2, score, class in pixels of its input.
    """

    name: str
    outputs: str
    fits: Callable[[list[Shape], tuple[int, int]], bool]
    keeps_aspect: bool
    rows: Callable[[list[Float], tuple[int, int]], Float]


DETECTOR_KINDS = (
    DetectorKind(
        name="YOLOX or RTMDet by mmdeploy", outputs="(N, R, 5) and (N, R)",
        fits=lambda shapes, hw: len(shapes) >= 2 and _ends(shapes[0], 3, 5) and len(shapes[1]) == 2,
        keeps_aspect=True, rows=lambda outputs, hw: rows_from_labelled(outputs[0], outputs[1]),
    ),
    DetectorKind(
        name="YOLOX", outputs="(N, cells, 5 + C)",
        fits=lambda shapes, hw: len(shapes[0]) == 3 and shapes[0][1] == num_cells(hw) and _at_least(shapes[0][2], 6),
        keeps_aspect=True, rows=lambda outputs, hw: rows_from_yolox(outputs[0], hw),
    ),
    DetectorKind(
        name="YOLOv8", outputs="(N, 4 + C, cells)",
        fits=lambda shapes, hw: len(shapes[0]) == 3 and shapes[0][2] == num_cells(hw) and _at_least(shapes[0][1], 5),
        keeps_aspect=False, rows=lambda outputs, hw: rows_from_yolov8(outputs[0]),
    ),
    DetectorKind(
        name="YOLOv10", outputs="(N, R, 6)",
        fits=lambda shapes, hw: _ends(shapes[0], 3, 6) and not _at_least(shapes[0][1], _LEAST_CELL_ROWS),
        keeps_aspect=False, rows=lambda outputs, hw: outputs[0],
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PoseKind:
    """How a pose network is recognised by its outputs' shapes; `axes`: of SimCC, 0: heat maps."""

    name: str
    outputs: str
    axes: int


POSE_KINDS = (
    PoseKind(name="ViTPose", outputs=f"heat maps (N, {NUM_KEYPOINTS}, h, w)", axes=0),
    PoseKind(name="RTMPose, RTMW or DWPose", outputs=f"two SimCC outputs (N, {NUM_KEYPOINTS}, bins)", axes=2),
    PoseKind(name="RTMW3D", outputs=f"three SimCC outputs (N, {NUM_KEYPOINTS}, bins)", axes=3),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Key points of T people: (T, 133, 3) float32 x, y pixels, score; with depth (T, 133, 4) x, y, z, score.

    z is in metres from the middle of the hips, away from the camera.
    """

    keypoints: Float
    keypoints_3d: Float | None


class PersonFinder:
    """A detector of any known kind."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._hw = _input_hw(model, _DETECTOR_HW)
        shapes = model.output_shapes
        kind = next((kind for kind in DETECTOR_KINDS if kind.fits(shapes, self._hw)), None)
        if kind is None or not _takes_pictures(model):
            raise ValueError(_unknown(model, "person detector", [(k.name, k.outputs) for k in DETECTOR_KINDS]))
        self.kind: DetectorKind = kind

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""
        return self._model.seconds_in_network

    def people(self, frames_rgb: Frames) -> list[Float]:
        """Return everyone in each frame: T arrays (K, 5) of x1, y1, x2, y2, score, pixels of the frame."""
        step = self._model.batch_frames
        batches = [frames_rgb[i : i + step] for i in range(0, len(frames_rgb), step)]
        return [people for batch in batches for people in self._batch(batch)]

    def _batch(self, frames_rgb: Frames) -> list[Float]:
        frame_hw = (frames_rgb.shape[1], frames_rgb.shape[2])
        if not self.kind.keeps_aspect:
            rows = self.kind.rows(self._model.run_all(detector_input(frames_rgb, hw=self._hw)), self._hw)
            return [decode_people(frame_rows, frame_hw, input_hw=self._hw) for frame_rows in rows]
        letterbox = letterbox_bgr(frames_rgb, self._hw)
        rows = self.kind.rows(self._model.run_all(letterbox.pixels), self._hw)
        in_frame = np.concatenate([rows[..., :4] / letterbox.scale, rows[..., 4:]], axis=-1)
        return [decode_people(frame_rows, frame_hw, input_hw=frame_hw) for frame_rows in in_frame]


class PoseMeasurer:
    """A whole-body pose network of any known kind."""

    def __init__(self, model: OnnxModel, *, profile: PreprocessProfile) -> None:
        self._model, self._profile = model, profile
        self._hw = _input_hw(model, _POSE_HW)
        kind = _pose_kind(model.output_shapes) if _takes_pictures(model) else None
        if kind is None:
            raise ValueError(_unknown(model, "whole-body pose network", [(k.name, k.outputs) for k in POSE_KINDS]))
        self.kind: PoseKind = kind

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""
        return self._model.seconds_in_network

    def __call__(self, frames_rgb: Sequence[Frames] | Frames, boxes_xyxys: Float) -> Measured:
        """Measure one person a frame.

        frames_rgb: T frames (H, W, 3) uint8 of one size, repeats allowed. boxes_xyxys: (T, 5), score below 0: nobody.
        With the `wan` profile a frame without a person is not run: x, y are NaN, the score is 0.
        """
        if boxes_xyxys.shape != (len(frames_rgb), 5):
            raise ValueError(f"boxes of shape {boxes_xyxys.shape} for {len(frames_rgb)} frames, give (T, 5)")
        measured = np.ones(len(frames_rgb), bool)
        if self._profile.frame_without_person == "absent":
            measured = boxes_xyxys[:, 4] > 0
        points = np.full((len(frames_rgb), NUM_KEYPOINTS, 4), np.nan, np.float32)
        points[..., 3] = 0
        todo = np.flatnonzero(measured)
        for start in range(0, len(todo), self._model.batch_frames):
            batch = todo[start : start + self._model.batch_frames]
            points[batch] = self._batch(np.stack([frames_rgb[i] for i in batch]), boxes_xyxys[batch])
        return Measured(keypoints=points[..., [0, 1, 3]], keypoints_3d=points if self.kind.axes == 3 else None)

    def _batch(self, frames_rgb: Frames, boxes_xyxys: Float) -> Float:
        """(T, 133, 4) x, y, z, score; z NaN without depth."""
        crops = crops_of_boxes(boxes_xyxys, (frames_rgb.shape[1], frames_rgb.shape[2]), input_hw=self._hw)
        depth = np.full((len(frames_rgb), NUM_KEYPOINTS), np.nan, np.float32)
        if self.kind.axes == 0:
            keypoints = self._heatmaps(frames_rgb, crops)
        else:
            batch = simcc_input(frames_rgb, crops, input_hw=self._hw, profile=self._profile)
            outputs = self._model.run_all(batch, num_outputs=self.kind.axes)
            keypoints = decode_simcc(outputs[0], outputs[1], center_xy=crops.center_xy, size_wh=crops.size_wh)
            if self.kind.axes == 3:
                depth = np.where(keypoints[..., 2] > 0, decode_depth(outputs[2]), np.nan)
        return np.concatenate([keypoints[..., :2], depth[..., None], keypoints[..., 2:]], axis=2)

    def _heatmaps(self, frames_rgb: Frames, crops: Crops) -> Float:
        batch = pose_input(frames_rgb, crops, input_hw=self._hw, profile=self._profile)
        return decode_heatmaps(self._model.run(batch), center_xy=crops.center_xy, size_wh=crops.size_wh)


def open_detector(
    path: str | Path, *, provider: str = "cpu", num_threads: int = 1, batch_frames: int = 8
) -> PersonFinder:
    """Open a person detector. Raises ValueError as `OnnxModel` does, or for a file of no known kind."""
    return PersonFinder(_open(path, provider=provider, num_threads=num_threads, batch_frames=batch_frames))


def open_pose(
    path: str | Path,
    *,
    provider: str = "cpu",
    num_threads: int = 1,
    batch_frames: int = 8,
    profile: PreprocessProfile = WAN,
) -> PoseMeasurer:
    """Open a whole-body pose network. Raises ValueError as `OnnxModel` does, or for a file of no known kind."""
    model = _open(path, provider=provider, num_threads=num_threads, batch_frames=batch_frames)
    return PoseMeasurer(model, profile=profile)


def _open(path: str | Path, **options: Any) -> OnnxModel:
    """A folder means `end2end.onnx` in it, as mmdeploy exports."""
    path = Path(path)
    return OnnxModel(path / "end2end.onnx" if path.is_dir() else path, **options)


def _pose_kind(shapes: list[Shape]) -> PoseKind | None:
    if any(len(shape) < 3 or (shape[1] not in (NUM_KEYPOINTS, None) and isinstance(shape[1], int)) for shape in shapes):
        return None
    axes = 0 if len(shapes[0]) == 4 else len(shapes)
    return next((kind for kind in POSE_KINDS if kind.axes == axes), None)


def _takes_pictures(model: OnnxModel) -> bool:
    return len(model.input_shape) == 4 and model.input_shape[1] == 3


def _input_hw(model: OnnxModel, default: tuple[int, int]) -> tuple[int, int]:
    height, width = model.input_shape[2:] if len(model.input_shape) == 4 else (None, None)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else default


def _ends(shape: Shape, num_dims: int, last: int) -> bool:
    return len(shape) == num_dims and shape[-1] == last


def _at_least(size: Any, least: int) -> bool:
    return isinstance(size, int) and size >= least


def _unknown(model: OnnxModel, what: str, known: list[tuple[str, str]]) -> str:
    kinds = "; ".join(f"{name}: {outputs}" for name, outputs in known)
    shapes = ", ".join(map(str, model.output_shapes))
    return (
        f"{model.path}: input {model.input_shape}, outputs {shapes}; a {what} has input (N, 3, H, W) and outputs like "
        f"one of these: {kinds}"
    )
