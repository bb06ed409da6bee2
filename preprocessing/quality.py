"""Figures that tell good clips from bad ones, for filtering; none of them changes a clip."""

from itertools import pairwise

import cv2
import numpy as np

from preprocessing.masks import Mask
from preprocessing.pose import metas_from_keypoints
from preprocessing.types import Float, Frames, Int
from wan_accel.data.skeleton import DRAWING_THRESHOLD

_NUM_BODY = 17
_HANDS = slice(91, 133)
_SAME_PERSON_IOU = 0.3


def mean_keypoint_score(keypoints: Float) -> float:
    """Return the mean score of the 17 COCO body points of (T, 133, 3), 0..1."""
    return float(keypoints[:, :_NUM_BODY, 2].mean())


def hand_score(keypoints: Float) -> float:
    """Return the mean score of the 42 hand points of (T, 133, 3), 0..1."""
    return float(keypoints[:, _HANDS, 2].mean())


def visible_share(keypoints: Float, frame_hw: tuple[int, int]) -> float:
    """Return the share, over frames, of the 20 body points that score 0.5 and lie in the picture."""
    body = metas_from_keypoints(keypoints, frame_hw).body
    inside = ((body[..., :2] >= 0) & (body[..., :2] < 1)).all(axis=2)
    return float((inside & (body[..., 2] >= DRAWING_THRESHOLD)).mean())


def face_size(face_boxes_xyxy: Int) -> float:
    """Return the median over frames of the shorter side of (T, 4) face boxes, pixels."""
    return float(np.median((face_boxes_xyxy[:, 2:] - face_boxes_xyxy[:, :2]).min(axis=1)))


def mask_area_mean(mask: Mask) -> float:
    """Return the share of the picture that (T, H, W) masks cover, 0..1."""
    return float(mask.mean())


def mask_area_jitter(mask: Mask) -> float:
    """Return the mean change of the mask's area from frame to frame, as a share of its mean area.

    A person that moves changes it by a few per cent; 0.1 and more means that the mask flickers.
    """
    areas = mask.mean(axis=(1, 2))
    if len(areas) < 2 or areas.mean() == 0:
        return 0.0
    return float(np.abs(np.diff(areas)).mean() / areas.mean())


def motion(keypoints: Float, boxes_xyxys: Float) -> float:
    """Return how far visible body points move from frame to frame, in heights of the person's box.

    keypoints (T, 133, 3); boxes (T, 5). The mean over points that score 0.5 in both frames; 0 without any.
    Measured in the picture, so a moving camera counts as motion.
    """
    body = keypoints[:, :_NUM_BODY]
    seen = body[..., 2] >= DRAWING_THRESHOLD
    seen_twice = seen[1:] & seen[:-1] & (boxes_xyxys[1:, 4] > 0)[:, None]
    height = np.maximum(boxes_xyxys[1:, 3] - boxes_xyxys[1:, 1], 1)
    steps = np.linalg.norm(np.diff(body[..., :2], axis=0), axis=2) / height[:, None]
    return float(steps[seen_twice].mean()) if seen_twice.any() else 0.0


def luma_change(frames_rgb: Frames) -> float:
    """Return the mean absolute change of luma from frame to frame, in 8-bit steps; near 0: a still picture.

    Measured on a quarter of the size, where the grain of a camera does not count as change.
    """
    height, width = max(1, frames_rgb.shape[1] // 4), max(1, frames_rgb.shape[2] // 4)
    small = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames_rgb]
    luma = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.int16) for frame in small]
    return float(np.mean([np.abs(b - a).mean() for a, b in pairwise(luma)])) if len(luma) > 1 else 0.0


def blur(frames_rgb: Frames, boxes_xyxys: Float | None) -> float:
    """Return the median variance of the Laplacian of the luma in the person's box; LOW means blurred.

    In squared 8-bit steps: below about 50 looks soft. Frames without a person are measured as a whole.
    """
    if boxes_xyxys is None:
        boxes_xyxys = np.full((len(frames_rgb), 5), -1.0)
    variances = []
    for frame, box in zip(frames_rgb, boxes_xyxys, strict=True):
        height, width = frame.shape[:2]
        x1, y1, x2, y2 = np.clip(box[:4], 0, [width, height, width, height]).astype(int)
        if box[4] <= 0 or x2 - x1 < 3 or y2 - y1 < 3:
            x1, y1, x2, y2 = 0, 0, width, height
        luma = cv2.cvtColor(frame[y1:y2, x1:x2], cv2.COLOR_RGB2GRAY)
        variances.append(float(cv2.Laplacian(luma, cv2.CV_32F).var()))
    return float(np.median(variances))


def track_switches(boxes_xyxys: Float) -> int:
    """Count the jumps of (T, 5) boxes to another person: overlap (IoU) below 0.3 with the box before.

    Frames without a person are skipped.
    """
    boxes = boxes_xyxys[boxes_xyxys[:, 4] > 0]
    if len(boxes) < 2:
        return 0
    before, after = boxes[:-1], boxes[1:]
    low, high = np.maximum(before[:, :2], after[:, :2]), np.minimum(before[:, 2:4], after[:, 2:4])
    shared = np.maximum(high - low, 0).prod(axis=1)
    areas = [(b[:, 2:4] - b[:, :2]).prod(axis=1) for b in (before, after)]
    return int((shared < _SAME_PERSON_IOU * (areas[0] + areas[1] - shared)).sum())


def clip_quality(
    frames_rgb: Frames,
    *,
    boxes_xyxys: Float | None,
    keypoints: Float | None,
    face_boxes_xyxy: Int | None,
    mask: Mask | None,
) -> dict[str, float | None]:
    """Return the `quality` struct of a clip; a figure whose input is None is None."""
    frame_hw = (frames_rgb.shape[1], frames_rgb.shape[2])
    return {
        "mean_keypoint_score": None if keypoints is None else mean_keypoint_score(keypoints),
        "visible_share": None if keypoints is None else visible_share(keypoints, frame_hw),
        "hand_score": None if keypoints is None else hand_score(keypoints),
        "face_size": None if face_boxes_xyxy is None else face_size(face_boxes_xyxy),
        "mask_area_mean": None if mask is None else mask_area_mean(mask),
        "mask_area_jitter": None if mask is None else mask_area_jitter(mask),
        "motion": None if keypoints is None or boxes_xyxys is None else motion(keypoints, boxes_xyxys),
        "luma_change": luma_change(frames_rgb),
        "blur": blur(frames_rgb, boxes_xyxys),
        "track_switches": None if boxes_xyxys is None else float(track_switches(boxes_xyxys)),
    }
