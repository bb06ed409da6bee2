"""The character of `--purpose drive`: its picture, its pose, and what carries a driving person over to it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from preprocessing.canvas import cover_resize, resize_by_area
from preprocessing.pose import hide_low_scores, metas_from_keypoints, pose62
from preprocessing.retarget import Retargeting, retarget
from preprocessing.types import Float, Frames, PoseMetas, PreprocessProfile

Measure = Callable[[Frames], PoseMetas | None]
"""Measures the main person of one picture (H, W, 3); None where there is nobody."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Character:
    """The picture that is driven, (H, W, 3) on its canvas, and its pose if retargeting was asked for."""

    picture_rgb: Frames
    metas: PoseMetas | None

    @property
    def hw(self) -> tuple[int, int]:
        return self.picture_rgb.shape[0], self.picture_rgb.shape[1]


def load_picture(path: str) -> Frames:
    """Read a picture as RGB (H, W, 3); raises ValueError for anything else."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"reference {path}: not a picture ({error})") from None


def load_character(
    path: str, *, area: int, divisor: int, profile: PreprocessProfile, measure: Measure | None
) -> Character:
    """Read a character and bring it to its canvas; `measure` where its pose is needed.

    Raises ValueError for a file that is no picture, or shows nobody although its pose is needed.
    """
    canvas = resize_by_area(load_picture(path), area, divisor, profile=profile)
    metas = measure(canvas) if measure else None
    if measure and metas is None:
        raise ValueError(f"reference {path}: no person found, which --retarget needs")
    return Character(picture_rgb=canvas, metas=metas)


def reference_on_canvas(path: str, hw: tuple[int, int]) -> Frames:
    """Read a picture of the clip's own person and fill the clip's canvas with it."""
    return cover_resize(load_picture(path), height=hw[0], width=hw[1])


def driven_pose(
    keypoints: Float,
    frame_hw: tuple[int, int],
    character: Character,
    fit: Retargeting | None,
    *,
    profile: PreprocessProfile,
) -> Float:
    """Return the (T, 62, 3) points that are drawn on the character's canvas, from (T, 133, 3) in driving frames."""
    if fit is not None:
        metas = metas_from_keypoints(keypoints, frame_hw, profile=profile)
        return hide_low_scores(retarget(metas, fit, profile=profile))
    # Without retargeting the driving picture is fitted onto the canvas, as the original pads its drawing.
    canvas, points = character.hw, pose62(keypoints, frame_hw, profile=profile).copy()
    scale = min(canvas[0] / frame_hw[0], canvas[1] / frame_hw[1])
    points[..., 0] = points[..., 0] * scale + (canvas[1] - frame_hw[1] * scale) / 2
    points[..., 1] = points[..., 1] * scale + (canvas[0] - frame_hw[0] * scale) / 2
    return points


