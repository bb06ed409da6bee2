"""Poses of one person carried over to another's proportions, size and place in the picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocessing.retarget_bones import (
    MIN_SCORE,
    edited_length_ratios,
    length_ratios,
    pixels,
    rebuild,
    relative_height,
    scaled_wh,
)
from preprocessing.retarget_hands import Hand, place_on_nearest_wrist
from preprocessing.types import WAN, Float, PoseMetas, PreprocessProfile

NECK, R_WRIST, L_WRIST = 1, 4, 7
R_HIP, R_ANKLE, L_HIP, L_ANKLE, L_TOE, R_TOE = 8, 10, 11, 13, 18, 19
_SHOULDER_LIMBS, _FOREARM_LIMBS = [0, 1], [3, 5]  # rows of LIMBS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Retargeting:
    """What turns a driving pose into the reference's: found once a clip by `fit_retargeting`.

    A driving point in pixels p, after its bones were multiplied by `length_ratios` (19,), in the order of
    skeleton.LIMBS, goes to (p - shift_xy) / scale, in pixels of the reference's canvas.
    """

    length_ratios: Float
    scale: float
    shift_xy: Float
    width: int
    height: int

    def described(self) -> dict[str, Any]:
        """In plain values, for a row's provenance."""
        return {
            "length_ratios": self.length_ratios.tolist(),
            "scale": self.scale,
            "shift_xy": self.shift_xy.tolist(),
            "canvas_hw": [self.height, self.width],
        }


def fit_retargeting(
    template: PoseMetas,
    reference: PoseMetas,
    *,
    edited_template: PoseMetas | None = None,
    edited_reference: PoseMetas | None = None,
    profile: PreprocessProfile = WAN,
) -> Retargeting:
    """Compare one frame of the driving person with the reference person, one frame each.

    The edited ones are the same two people redrawn in a standard pose, where bones are not foreshortened: given both,
    bone lengths come from them, size and place from the unedited ones. `wan` measures a bone only where both
    pictures show it: both ends score 0.4, and it does not point at the camera (shoulders in profile); the others
    take the ratio of their left or right twin, else the median. Formulae: Wan2.2 retarget_pose. Raises ValueError
    where one shows no person.
    """
    pictures = {
        "template": template, "reference": reference,
        "edited template": edited_template, "edited reference": edited_reference,
    }  # fmt: skip
    for name, metas in pictures.items():
        if metas is not None and not (np.isfinite(metas.body[0]).all() and metas.body[0, NECK, 2] > 0):
            raise ValueError(f"the {name} shows no person: give a picture with one, head to hips at least")
    if (edited_template is None) != (edited_reference is None):
        raise ValueError("give both an edited template and an edited reference, or neither")
    scale, _ = relative_height(template, reference)
    if edited_template is None or edited_reference is None:
        ratios = length_ratios(template, reference, scale=scale, profile=profile)
    else:
        ratios = edited_length_ratios(
            template, reference, edited_template, edited_reference, scale=scale, profile=profile
        )
    reference_xy = reference.body[0, :, :2] * scaled_wh(reference, scale, profile)
    rebuilt_xy = rebuild(pixels(template)[:1], ratios)[0]
    shift_xy = _shift(template, reference, rebuilt_xy, reference_xy, profile)
    return Retargeting(
        length_ratios=ratios,
        scale=scale,
        shift_xy=shift_xy,
        width=reference.width,
        height=reference.height,
    )


def retarget(metas: PoseMetas, fit: Retargeting, *, profile: PreprocessProfile = WAN) -> Float:
    """Carry driving poses over: (T, 62, 3) float64 x, y in pixels of the reference's canvas, score.

    Body points are all given, hand points that score below 0.4 are NaN; `pose.hide_low_scores` makes of it
    what the dataset stores. Hands are scaled (like the shoulders in the original, the forearms in `wan`)
    and hung on the wrists.
    """
    source_xy = pixels(metas)
    body_xy = (rebuild(source_xy, fit.length_ratios) - fit.shift_xy) / fit.scale
    like_hands = _SHOULDER_LIMBS if profile.retarget_hand_size == "shoulders" else _FOREARM_LIMBS
    gain = float(fit.length_ratios[like_hands].max()) / fit.scale
    wh = np.array([metas.width, metas.height])
    left, right = (
        Hand(
            points=points.astype(np.float64) * [*wh, 1],
            wrist_xy=source_xy[:, wrist],
            moved_wrist_xy=body_xy[:, wrist],
            gain=gain,
            whole_pixels=profile.retarget_rounding == "whole_pixels",
        )
        for points, wrist in ((metas.left_hand, L_WRIST), (metas.right_hand, R_WRIST))
    )
    if profile.retarget_hands == "own_wrist":
        left_points, right_points = left.placed(left), right.placed(right)
    else:
        left_points, right_points = place_on_nearest_wrist(left, right, missing_xy=-wh)
    body = np.concatenate([body_xy, metas.body[..., 2:]], axis=2)
    return np.concatenate([body, left_points, right_points], axis=1)


def _shift(
    template: PoseMetas,
    reference: PoseMetas,
    rebuilt_xy: Float,
    reference_xy: Float,
    profile: PreprocessProfile,
) -> Float:
    """Return what to subtract from rebuilt points so that the two stand in the same place.

    With feet in both pictures: hips above each other, lowest foot on the same line. Otherwise neck on neck.
    """
    if not (_shows_feet(template) and _shows_feet(reference)):
        return np.asarray(rebuilt_xy[NECK] - reference_xy[NECK], np.float64)
    if profile.ground_contact == "source_ankle":
        source_y = max(rebuilt_xy[R_ANKLE, 1], rebuilt_xy[L_ANKLE, 1])
        ground_y = _ground(reference_xy, np.ones(20, bool))
    else:
        seen = (template.body[0, :, 2] >= MIN_SCORE) & (reference.body[0, :, 2] >= MIN_SCORE)
        source_y, ground_y = _ground(rebuilt_xy, seen), _ground(reference_xy, seen)
    hips = [R_HIP, L_HIP]
    shift_x = rebuilt_xy[hips, 0].mean() - reference_xy[hips, 0].mean()
    return np.array([shift_x, source_y - ground_y])


def _ground(points_xy: Float, seen: np.ndarray) -> float:
    """Return the y of the lower foot: the mean of ankle and toe, or the ankles where a toe is unseen."""
    both_toes = bool(seen[[R_TOE, L_TOE]].all())
    feet = [[R_ANKLE, R_TOE], [L_ANKLE, L_TOE]] if both_toes else [[R_ANKLE], [L_ANKLE]]
    return max(float(points_xy[foot, 1].mean()) for foot in feet)


def _shows_feet(metas: PoseMetas) -> bool:
    points = metas.body[0, [R_HIP, R_ANKLE, L_HIP, L_ANKLE]]
    return bool((points[:, 1] <= 1).all() and (points[:, 2] >= MIN_SCORE).all())
