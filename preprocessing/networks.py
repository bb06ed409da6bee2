"""The person detector and the whole-body pose network, of whichever kind."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from preprocessing.detection import decode_people, detector_input
from preprocessing.heatmaps import decode_heatmaps
from preprocessing.network_kinds import DetectorKind, PoseKind, detector_kind, pose_kind
from preprocessing.onnx_model import NetworkOptions, OnnxModel
from preprocessing.pose import NUM_KEYPOINTS, Crops, crops_of_boxes, pose_input
from preprocessing.simcc import decode_depth, decode_simcc, simcc_input
from preprocessing.types import WAN, Float, FrameBatch, Frames, Int, PreprocessProfile
from preprocessing.yolo import letterbox_bgr

_DETECTOR_HW, _POSE_HW = (640, 640), (256, 192)  # of files that leave height and width free


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
        self.kind: DetectorKind = detector_kind(model, self._hw)

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""
        return self._model.seconds_in_network

    @property
    def batch_frames(self) -> int:
        """How many frames the network takes at a time."""
        return self._model.batch_frames

    def look(self, batches: Iterable[FrameBatch]) -> Iterator[tuple[FrameBatch, list[Float]]]:
        """Give each batch back with the people in it (see `people`), in order; works ahead of the caller."""
        return self._model.side_by_side(lambda batch: (batch, self.people(batch.frames_rgb)), batches)

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
        self.kind: PoseKind = pose_kind(model, self._hw)

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""
        return self._model.seconds_in_network

    @property
    def batch_frames(self) -> int:
        """How many frames the network takes at a time."""
        return self._model.batch_frames

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
        batches = [todo[start : start + self.batch_frames] for start in range(0, len(todo), self.batch_frames)]

        def measure(batch: Int) -> Float:
            return self._batch(np.stack([frames_rgb[i] for i in batch]), boxes_xyxys[batch])

        for batch, measured_points in zip(batches, self._model.side_by_side(measure, batches), strict=True):
            points[batch] = measured_points
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


def open_detector(path: str | Path, **options: Unpack[NetworkOptions]) -> PersonFinder:
    """Open a person detector. Raises ValueError as `OnnxModel` does, or for a file of no known kind."""
    return PersonFinder(OnnxModel(path, **options))


def open_pose(path: str | Path, *, profile: PreprocessProfile = WAN, **options: Unpack[NetworkOptions]) -> PoseMeasurer:
    """Open a whole-body pose network. Raises ValueError as `OnnxModel` does, or for a file of no known kind."""
    return PoseMeasurer(OnnxModel(path, **options), profile=profile)


def _input_hw(model: OnnxModel, default: tuple[int, int]) -> tuple[int, int]:
    height, width = model.input_shape[2:] if len(model.input_shape) == 4 else (None, None)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else default
