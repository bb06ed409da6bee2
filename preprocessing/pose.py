"""Whole-body key points: crops for a ViTPose-style network, and point layouts."""

from dataclasses import dataclass

import cv2
import numpy as np

from preprocessing.types import WAN, Float, Frames, Int, PoseMetas, PreprocessProfile, check_frames
from wan_accel.data.skeleton import DRAWING_THRESHOLD

NUM_KEYPOINTS = 133
_MEAN_RGB = np.array([0.485, 0.456, 0.406])  # float64: the last bit of the input decides what networks that
_STD_RGB = np.array([0.229, 0.224, 0.225])  # quantise it see
_SCALE_UNIT_PIXELS = 200
_CROP_MARGIN = 1.25
_MIN_BOX_PIXELS = 10
# COCO-WholeBody rows whose mean is each of the 20 body points: the neck between the shoulders, a toe
# between big and small toe.
_BODY_FIRST = [0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20]
_BODY_SECOND = [0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21]
_FACE, _LEFT_HAND, _RIGHT_HAND = slice(22, 91), slice(91, 112), slice(112, 133)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Crops:
    """Where N boxes are cut out for the network.

    center_xy (N, 2) pixels; scale_wh (N, 2) crop size / 200, which the decoding uses; top_left_xy and
    bottom_right_xy (N, 2) whole pixels, the latter exclusive; both may lie outside the frame.
    """

    center_xy: Float
    scale_wh: Float
    top_left_xy: Int
    bottom_right_xy: Int

    @property
    def size_wh(self) -> Float:
        """Crop sizes in pixels, not rounded."""
        return np.asarray(self.scale_wh * _SCALE_UNIT_PIXELS)


def crops_of_boxes(
    boxes_xyxys: Float, frame_hw: tuple[int, int], *, input_hw: tuple[int, int] = (256, 192)
) -> Crops:
    """Place the crop of each box: its centre, the network's aspect, a margin of a quarter.

    boxes_xyxys: (N, 5) x1, y1, x2, y2, score. A box that is NaN, without a positive score, or less than 10
    pixels wide or high becomes the whole frame (Wan2.2 pose2d.ViTPose.preprocess).
    """
    boxes = np.array(boxes_xyxys, np.float64)
    sizes = boxes[:, 2:4] - boxes[:, :2]
    usable = (boxes[:, 4] > 0) & (sizes >= _MIN_BOX_PIXELS).all(axis=1)
    boxes[~usable, :4] = 0, 0, frame_hw[1], frame_hw[0]
    center = (boxes[:, :2] + boxes[:, 2:4]) / 2
    width, height = (boxes[:, 2:4] - boxes[:, :2]).T
    aspect = input_hw[1] / input_hw[0]
    side = np.maximum(width / aspect, height)
    scale = np.stack([side * aspect, side], axis=1) / _SCALE_UNIT_PIXELS * _CROP_MARGIN
    # Corners through the frame -> input map and back, as in the original: where a corner falls on half a
    # pixel, the rounding errors of this very computation decide which pixel it becomes.
    input_wh, crop_wh = np.array(input_hw[::-1], np.float64), scale * _SCALE_UNIT_PIXELS
    to_input = np.zeros((len(boxes), 3, 3))
    to_input[:, [0, 1], [0, 1]] = input_wh / crop_wh
    to_input[:, :2, 2] = input_wh * (0.5 - center / crop_wh)
    to_input[:, 2, 2] = 1
    corners_xy = np.linalg.inv(to_input) @ np.array([[0, 0, 1], [*input_wh, 1]]).T
    return Crops(
        center_xy=center,
        scale_wh=scale,
        top_left_xy=np.rint(corners_xy[:, :2, 0]).astype(np.int64),
        bottom_right_xy=np.rint(corners_xy[:, :2, 1]).astype(np.int64),
    )


def pose_input(
    frames_rgb: Frames,
    crops: Crops,
    *,
    input_hw: tuple[int, int] = (256, 192),
    profile: PreprocessProfile = WAN,
) -> Float:
    """Cut out one crop a frame and normalise it: (N, 3, *input_hw) float32, black outside the frame."""
    check_frames(frames_rgb)
    result = np.empty((len(frames_rgb), 3, *input_hw), np.float32)
    for i, frame in enumerate(frames_rgb):
        crop = _cut(frame, crops.top_left_xy[i], crops.bottom_right_xy[i])
        resized = cv2.resize(crop, (input_hw[1], input_hw[0]), interpolation=cv2.INTER_LINEAR)
        ordered = resized if profile.pose_channel_order == "rgb" else resized[..., ::-1]
        result[i] = ((ordered / np.float32(255) - _MEAN_RGB) / _STD_RGB).transpose(2, 0, 1)
    return result


def _cut(frame: Frames, top_left_xy: Int, bottom_right_xy: Int) -> Float:
    height, width = frame.shape[:2]
    (x1, y1), (x2, y2) = top_left_xy, bottom_right_xy
    crop = np.zeros((y2 - y1, x2 - x1, 3), np.float32)
    inside_x, inside_y = slice(max(x1, 0), min(x2, width)), slice(max(y1, 0), min(y2, height))
    if inside_x.start < inside_x.stop and inside_y.start < inside_y.stop:
        crop[inside_y.start - y1 : inside_y.stop - y1, inside_x.start - x1 : inside_x.stop - x1] = frame[
            inside_y, inside_x
        ]
    return crop


def metas_from_keypoints(
    keypoints: Float, frame_hw: tuple[int, int], *, profile: PreprocessProfile = WAN
) -> PoseMetas:
    """Turn (T, 133, 3) COCO-WholeBody points in pixels into the layout that is drawn.

    Position and score of a body point are the means over the one or two points behind it. A body that lies
    outside the top or left edge altogether is lost: it gets the previous frame's points or score 0 (profile).
    """
    height, width = frame_hw
    relative = (keypoints / np.array([width, height, 1], np.float32)).astype(np.float32)
    body = (relative[:, _BODY_FIRST] + relative[:, _BODY_SECOND]) / 2
    for i in np.flatnonzero((body[..., :2].min(axis=2) < 0).all(axis=1)):
        if profile.lost_body == "absent":
            body[i, :, 2] = 0
        elif i > 0:
            body[i] = body[i - 1]
        else:
            raise ValueError("the first frame shows no body: start the clip where the person is in view")
    return PoseMetas(
        body=body,
        left_hand=relative[:, _LEFT_HAND],
        right_hand=relative[:, _RIGHT_HAND],
        face=relative[:, _FACE],
        width=width,
        height=height,
    )


def pose62(keypoints: Float, frame_hw: tuple[int, int], *, profile: PreprocessProfile = WAN) -> Float:
    """Reduce (T, 133, 3) points to the (T, 62, 3) that are drawn: see `pose62_from_metas`."""
    return pose62_from_metas(metas_from_keypoints(keypoints, frame_hw, profile=profile))


def pose62_from_metas(metas: PoseMetas) -> Float:
    """Stack body, left and right hand: (T, 62, 3) float64 x, y in pixels of the canvas, score.

    x, y are NaN where the score is below the drawing threshold (0.5); the score is kept.
    """
    points = np.concatenate([metas.body, metas.left_hand, metas.right_hand], axis=1).astype(np.float64)
    points[..., :2] *= metas.width, metas.height
    return hide_low_scores(points)


def hide_low_scores(pose62: Float) -> Float:
    """Return (..., 3) points with x, y NaN where the score is below the drawing threshold (0.5)."""
    shown = pose62[..., 2:] >= DRAWING_THRESHOLD
    return np.concatenate([np.where(shown, pose62[..., :2], np.nan), pose62[..., 2:]], axis=-1)
