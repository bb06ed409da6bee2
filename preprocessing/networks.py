"""Networks opened by what their files hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocessing.detection import PersonDetector
from preprocessing.pose import WholeBodyPose
from preprocessing.types import WAN, Float, Frames, PreprocessProfile


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Key points of T people: (T, 133, 3) float32 x, y pixels, score; with depth (T, 133, 4) x, y, z, score."""

    keypoints: Float
    keypoints_3d: Float | None


class PoseNetwork:
    """Measures one person a frame."""

    def __init__(self, network: WholeBodyPose) -> None:
        self._network = network

    def __call__(self, frames_rgb: Sequence[Frames] | Frames, boxes_xyxys: Float) -> Measured:
        """Measure the person in each box: frames (T, H, W, 3), boxes (T, 5)."""
        frames = frames_rgb if isinstance(frames_rgb, np.ndarray) else np.stack(frames_rgb)
        return Measured(keypoints=self._network(frames, boxes_xyxys), keypoints_3d=None)


def open_detector(
    path: str | Path,
    *,
    provider: str = "cpu",
    device_id: int = 0,
    num_threads: int = 1,
    batch_frames: int = 8,
    fp16: bool = False,
) -> PersonDetector:
    """Open a person detector. Raises ValueError for a file of another kind."""
    _refuse(fp16, device_id)
    return PersonDetector(path, provider=provider, num_threads=num_threads, batch_frames=batch_frames)


def open_pose(
    path: str | Path,
    *,
    provider: str = "cpu",
    device_id: int = 0,
    num_threads: int = 1,
    batch_frames: int = 8,
    fp16: bool = False,
    profile: PreprocessProfile = WAN,
) -> PoseNetwork:
    """Open a whole-body pose network. Raises ValueError for a file of another kind."""
    _refuse(fp16, device_id)
    return PoseNetwork(
        WholeBodyPose(path, provider=provider, num_threads=num_threads, batch_frames=batch_frames, profile=profile)
    )


def _refuse(fp16: bool, device_id: int) -> None:
    if fp16:
        raise ValueError("--fp16 is not supported yet: leave it out")
    if device_id:
        raise ValueError(f"device {device_id} is not supported yet: use CUDA_VISIBLE_DEVICES and device 0")
