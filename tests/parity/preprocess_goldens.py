"""Recorded outputs of the original Wan2.2-Animate preprocessing, and the values that several tests share.

WAN_ACCEL_GOLDENS and WAN_ACCEL_DEMO_GOLDENS name other recordings of the same format: sizes, counts and inputs are
read from the files, so that any will do. Sizes in file names are labels; frame numbers and cases in them count.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.pose import metas_from_keypoints
from preprocessing.types import PROFILES, Frames, PoseMetas

REPOSITORY = Path(__file__).parents[2]
GOLDENS = Path(os.environ.get("WAN_ACCEL_GOLDENS", REPOSITORY / "tests/golden")) / "preprocess"
DEMO_GOLDENS = Path(os.environ.get("WAN_ACCEL_DEMO_GOLDENS", REPOSITORY / "tests/golden/demo"))
DEMO = REPOSITORY / "demo"
UPSTREAM = PROFILES["upstream"]

# Without these an empty folder would be no test rather than a failed one.
for _variable, _folder in (("WAN_ACCEL_GOLDENS", GOLDENS), ("WAN_ACCEL_DEMO_GOLDENS", DEMO_GOLDENS)):
    if not any(_folder.glob("*.npz")):
        raise ValueError(f"{_folder} holds no recordings (*.npz): set {_variable} to a folder that does")


@cache
def arrays(name: str, folder: Path = GOLDENS) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def names(pattern: str, folder: Path = GOLDENS) -> list[str]:
    """Files like `pattern`, of which there must be some: a test of none would pass."""
    found = sorted(path.name for path in folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} holds no {pattern}")
    return found


def picture(path: str | Path, folder: Path = GOLDENS) -> Frames:
    return np.array(Image.open(folder / path).convert("RGB"))


def frame_number(name: str) -> int:
    """The NN of 06_pose_fNN_*.png."""
    return int(re.search(r"_f(\d+)[_.]", name)[1])


def strided(golden: dict[str, Any], prefix: str) -> tuple[np.ndarray, int]:
    """The array `<prefix>_stride<N>` and its N: every N-th row and column was recorded."""
    (key,) = (key for key in golden if re.fullmatch(rf"{prefix}_stride\d+", key))
    return golden[key], int(key.rsplit("stride", 1)[1])


def full_hw(golden: dict[str, Any], prefix: str) -> tuple[int, int]:
    """Height and width of the network input (..., H, W) that was recorded with a stride."""
    sampled, stride = strided(golden, prefix)
    return sampled.shape[-2] * stride, sampled.shape[-1] * stride


def hw(wh: np.ndarray) -> tuple[int, int]:
    return int(wh[1]), int(wh[0])


def rolled_frames() -> Frames:
    """The frames of the end-to-end recording: one picture, moved sideways."""
    frame = picture("01_frame_rgb.png")
    return np.stack([np.roll(frame, pixels, axis=1) for pixels in arrays("14_pose2d_e2e")["roll"]])


def source_metas(keypoints: np.ndarray) -> PoseMetas:
    """Metas in the driving clip's picture."""
    return metas_from_keypoints(keypoints, hw(arrays("01_inputs")["src_wh"]), profile=UPSTREAM)


def reference_metas(keypoints: np.ndarray) -> PoseMetas:
    return metas_from_keypoints(keypoints, hw(arrays("01_inputs")["ref_wh"]), profile=UPSTREAM)
