"""Which frame of a driving video to compare with the character."""

import numpy as np

from preprocessing.retarget_bones import MIN_SCORE
from preprocessing.skeleton import LIMBS
from preprocessing.types import WAN, Float, PoseMetas, PreprocessProfile

_MOST_POINTS = 0.9
_FULL_LENGTH_QUANTILE = 0.9  # not the maximum: single frames are measured wrongly
_SIZED = slice(0, 12)  # limbs of the body: shoulders, arms, trunk, legs
_PARENTS, _CHILDREN = np.array(LIMBS)[_SIZED].T


def choose_template(metas: PoseMetas, *, profile: PreprocessProfile = WAN) -> int:
    """Choose the frame in which the most foreshortened bone is foreshortened least.

    A bone that points at the camera in the template looks short, and would come out too long in every other frame:
    shoulders in profile, several times. Among frames that show nine tenths of the most body points that any shows,
    each bone's length is compared with its 0.9 quantile over time; the frame whose worst bone is best is taken.
    `upstream` takes the first frame, as the original does.
    """
    if profile.retarget_ratios == "all_points":
        return 0
    shares = _shares_of_full_length(metas)
    num_points = (metas.body[..., 2] >= MIN_SCORE).sum(axis=1)
    candidates = num_points >= _MOST_POINTS * num_points.max()
    worst = np.where(np.isnan(shares), np.inf, shares).min(axis=1)
    return int(np.where(candidates & np.isfinite(worst), worst, -1.0).argmax())


def _shares_of_full_length(metas: PoseMetas) -> Float:
    """(T, 12) bone lengths over their long ones, at most 1; NaN where a bone is not seen."""
    seen = metas.body[..., 2] >= MIN_SCORE
    xy_pixels = metas.body[..., :2].astype(np.float64) * [metas.width, metas.height]
    lengths = np.linalg.norm(xy_pixels[:, _PARENTS] - xy_pixels[:, _CHILDREN], axis=2)
    shares = np.full(lengths.shape, np.nan)
    for bone, known in enumerate((seen[:, _PARENTS] & seen[:, _CHILDREN]).T):
        full = np.quantile(lengths[known, bone], _FULL_LENGTH_QUANTILE) if known.any() else 0.0
        if full > 0:
            shares[known, bone] = np.minimum(lengths[known, bone] / full, 1.0)
    return shares
