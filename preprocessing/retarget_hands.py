"""Hands that follow retargeted wrists."""

from dataclasses import dataclass

import numpy as np

from preprocessing.types import Float

_MIN_SCORE = 0.4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hand:
    """One hand of T frames in driving pixels, and where its wrist was and is."""

    points: Float  # (T, 21, 3)
    wrist_xy: Float  # (T, 2)
    moved_wrist_xy: Float  # (T, 2)
    gain: float
    whole_pixels: bool

    @property
    def has_root(self) -> np.ndarray:
        return np.asarray(self.points[:, 0, 2] >= _MIN_SCORE)

    def placed(self, shape: "Hand") -> Float:
        """Return (T, 21, 3): the points of `shape`, scaled about their root, moved as this hand moves.

        The root lands on the moved wrist; without a root the hand follows its wrist. NaN where a point scores
        below 0.4.
        """
        result = shape.points.copy()
        root_xy = shape.points[:, :1, :2]
        scaled_xy = root_xy + (shape.points[..., :2] - root_xy) * shape.gain
        start_xy = np.where(self.has_root[:, None], self.points[:, 0, :2], self.wrist_xy)
        moved_xy = scaled_xy + (self.moved_wrist_xy - start_xy)[:, None]
        result[..., :2] = np.trunc(moved_xy) if self.whole_pixels else moved_xy
        result[result[..., 2] < _MIN_SCORE, :2] = np.nan
        return result

    def nearer_to(self, other_wrist_xy: Float, *, than: Float, missing_xy: Float) -> np.ndarray:
        """Say for each frame if the root is nearer to the other wrist; `missing_xy` stands for no root."""
        root_xy = np.where(self.has_root[:, None], self.points[:, 0, :2], missing_xy)
        distance, other_distance = (
            np.linalg.norm(wrist - root_xy, axis=1) for wrist in (than, other_wrist_xy)
        )
        return np.asarray(distance > other_distance)


def place_on_nearest_wrist(left: Hand, right: Hand, *, missing_xy: Float) -> tuple[Float, Float]:
    """Place both hands as the original does: two (T, 21, 3), for the left and the right wrist.

    Where the right hand's root is nearer to the left wrist, the hands trade places, each moved by the other's
    offset, so that neither lands on its wrist.
    """
    swapped = right.nearer_to(left.wrist_xy, than=right.wrist_xy, missing_xy=missing_xy)[:, None, None]
    return (
        np.where(swapped, left.placed(right), left.placed(left)),
        np.where(swapped, right.placed(left), right.placed(right)),
    )
