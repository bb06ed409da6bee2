"""Recorded outputs of the original Wan2.2-Animate preprocessing, and the values that several tests share."""

import os
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


@cache
def arrays(name: str, folder: Path = GOLDENS) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def picture(path: str | Path, folder: Path = GOLDENS) -> Frames:
    return np.array(Image.open(folder / path).convert("RGB"))


def hw(wh: np.ndarray) -> tuple[int, int]:
    return int(wh[1]), int(wh[0])


def source_metas(keypoints: np.ndarray) -> PoseMetas:
    """Metas in the driving clip's picture."""
    return metas_from_keypoints(keypoints, hw(arrays("01_inputs")["src_wh"]), profile=UPSTREAM)


def reference_metas(keypoints: np.ndarray) -> PoseMetas:
    return metas_from_keypoints(keypoints, hw(arrays("01_inputs")["ref_wh"]), profile=UPSTREAM)
