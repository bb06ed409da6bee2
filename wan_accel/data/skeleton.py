"""Drawings of poses as Wan2.2-Animate was trained on them: body limbs, joints and hands, no face."""

import colorsys
import math

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating]
Frames = NDArray[np.uint8]

BODY, LEFT_HAND, RIGHT_HAND = slice(0, 20), slice(20, 41), slice(41, 62)  # rows of a 62-point pose
DRAWING_THRESHOLD = 0.5  # points that score less are not drawn

# Pairs of the 20 body points, starting at the neck so that every parent comes before its children.
LIMBS = (
    ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13))
    + ((1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19))
)  # fmt: skip
_FINGERS = tuple((0 if a % 4 == 0 else a, a + 1) for a in range(20))  # wrist to tip, thumb first
_BODY_COLORS = (
    ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0))
    + ((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255))
    + ((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0))
)  # fmt: skip
_LIMB_BRIGHTNESS = 0.6
_HAND_POINT_COLOR = (0, 0, 255)
_HEAD_POINTS = [0, 14, 15, 16, 17]


def draw_poses(pose62: Float, canvas_hw: tuple[int, int], *, draw_head: bool = True, draw_hands: bool = True) -> Frames:
    """Draw (T, 62, 3) poses (x, y in pixels of the canvas, score) on black: (T, *canvas_hw, 3) RGB uint8."""
    return np.stack([draw_pose(pose, canvas_hw, draw_head=draw_head, draw_hands=draw_hands) for pose in pose62])


def draw_pose(pose62: Float, canvas_hw: tuple[int, int], *, draw_head: bool = True, draw_hands: bool = True) -> Frames:
    """Draw one (62, 3) pose on black: (*canvas_hw, 3) RGB uint8.

    Points that are NaN or score below 0.5 are left out, and limbs with them. Coordinates are truncated to
    whole pixels; nothing is anti-aliased (Wan2.2 human_visualization.draw_aapose_by_meta_new).
    """
    canvas = np.zeros((*canvas_hw, 3), np.uint8)
    visible = (pose62[:, 2] >= DRAWING_THRESHOLD) & np.isfinite(pose62).all(axis=1)
    if not draw_head:
        visible[_HEAD_POINTS] = False
    stick_pixels = max(min(canvas_hw) // 200 - 1, 1)
    _draw_body(canvas, pose62[BODY, :2], visible[BODY], stick_pixels)
    if draw_hands:
        for hand in (LEFT_HAND, RIGHT_HAND):
            _draw_hand(canvas, pose62[hand, :2], visible[hand], max(stick_pixels // 2, 1))
    return canvas


def _draw_body(canvas: Frames, points_xy: Float, visible: np.ndarray, stick_pixels: int) -> None:
    for (a, b), color in zip(LIMBS, _BODY_COLORS):
        if not (visible[a] and visible[b]):
            continue
        (ax, ay), (bx, by) = points_xy[a], points_xy[b]
        center = int((ax + bx) / 2), int((ay + by) / 2)
        axes = int(math.hypot(ax - bx, ay - by) / 2), stick_pixels
        angle = int(math.degrees(math.atan2(ay - by, ax - bx)))
        outline = np.array(cv2.ellipse2Poly(center, axes, angle, 0, 360, 1))
        cv2.fillConvexPoly(canvas, outline, [int(_LIMB_BRIGHTNESS * channel) for channel in color])
    for i in np.flatnonzero(visible):
        x, y = points_xy[i]
        cv2.circle(canvas, (int(x), int(y)), stick_pixels, _BODY_COLORS[i], thickness=-1)


def _draw_hand(canvas: Frames, points_xy: Float, visible: np.ndarray, stick_pixels: int) -> None:
    # Hand points on the first row or column mean "not found" in the original.
    drawable = visible & (np.nan_to_num(points_xy) >= 1).all(axis=1)
    whole_xy = np.where(drawable[:, None], points_xy, 0).astype(np.int64)
    for i, (a, b) in enumerate(_FINGERS):
        if drawable[a] and drawable[b]:
            color = [channel * 255 for channel in colorsys.hsv_to_rgb(i / len(_FINGERS), 1, 1)]
            cv2.line(canvas, whole_xy[a].tolist(), whole_xy[b].tolist(), color, thickness=stick_pixels)
    for xy in whole_xy[drawable]:
        cv2.circle(canvas, xy.tolist(), stick_pixels, _HAND_POINT_COLOR, thickness=-1)
