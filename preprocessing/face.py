"""Face boxes from face landmarks, and the square crops that the face encoder sees."""

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.tracking import smooth_boxes
from preprocessing.types import WAN, Float, Frames, Int, PoseMetas, PreprocessProfile, check_frames

FACE_SIZE = 512
_MIN_FACE_PIXELS = 8
_MIN_FACE_SCORE = 0.3  # mean over the landmarks; the back of a head scores less


def face_boxes(metas: PoseMetas, *, scale: float = 1.3, profile: PreprocessProfile = WAN) -> Int | None:
    """Return the face box of each frame: (T, 4) int32 x1, y1, x2, y2 in pixels, inside the canvas.

    The extent of the 68 landmarks grows by sqrt(scale) each way, three quarters of the growth in height above
    the brow (Wan2.2 utils.get_face_bboxes). A frame without a usable face (no point measured, off screen, less than 8
    pixels wide or high; with square crops also unsure) takes the box of the nearest earlier frame that has one, else of
    the first that does; None where no frame has one. Square crops keep the face's shape, and follow it smoothly.
    The `upstream` profile raises ValueError for a face without extent, and leaves boxes off screen as they come, empty
    or negative.
    """
    wh = np.array([metas.width, metas.height])
    points_xy = metas.face[:, 1:, :2] * wh
    low_xy, high_xy = points_xy.min(axis=1), points_xy.max(axis=1)
    extent = high_xy - low_xy  # (T, 2) width, height
    if profile.degenerate_face == "raise" and not (extent > 0).all():
        frame = int(np.flatnonzero(~(extent > 0).all(axis=1))[0])
        raise ValueError(f"the face landmarks of frame {frame} have no extent")
    # sqrt(scale * w * h * (w / h)) = w * sqrt(scale); written out in the original, equal up to rounding.
    grown = (np.sqrt(scale) - 1) * extent
    low = np.maximum(low_xy - grown * [0.5, 0.75], 0)
    high = np.minimum(high_xy + grown * [0.5, 0.25], wh)
    boxes = np.concatenate([low, high], axis=1)
    if profile.degenerate_face == "raise":
        return boxes.astype(np.int32)
    boxes, scores = np.nan_to_num(boxes), metas.face[:, 1:, 2]
    if profile.face_crops == "stretched":
        boxes = boxes.astype(np.int32)
        return _fill_from_nearest(boxes, _usable(boxes, scores.max(axis=1) > 0))
    usable = _usable(boxes, scores.mean(axis=1) >= _MIN_FACE_SCORE)
    for run in np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1):  # a face may be elsewhere after a gap
        boxes[run] = smooth_boxes(boxes[run])
    return _fill_from_nearest(_squares(boxes, wh), usable)


def _usable(boxes_xyxy: Float | Int, measured: NDArray[np.bool_]) -> Int:
    """Numbers of the frames with a face to cut out."""
    return np.flatnonzero(measured & (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= _MIN_FACE_PIXELS).all(axis=1))


def _fill_from_nearest(boxes_xyxy: Int, usable: Int) -> Int | None:
    if len(usable) == 0:
        return None
    source = np.searchsorted(usable, np.arange(len(boxes_xyxy)), side="right") - 1
    return np.asarray(boxes_xyxy[usable[np.maximum(source, 0)]])


def _squares(boxes_xyxy: Float, wh: Int) -> Int:
    """Squares of the longer sides around the same middles, moved into the canvas; at most its shorter side."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    sides = np.minimum(np.rint((high - low).max(axis=1)), wh.min())[:, None]
    corners = np.clip(np.rint((low + high - sides) / 2), 0, wh - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.int32)


def crop_faces(frames_rgb: Frames, boxes_xyxy: Int, *, size: int = FACE_SIZE) -> Frames:
    """Cut out one box a frame and stretch it to a square: (T, size, size, 3).

    Raises ValueError for a box that holds no pixel.
    """
    check_frames(frames_rgb)
    crops = np.empty((len(frames_rgb), size, size, 3), np.uint8)
    for i, (frame, (x1, y1, x2, y2)) in enumerate(zip(frames_rgb, boxes_xyxy, strict=True)):
        if not (0 <= x1 < x2 <= frame.shape[1] and 0 <= y1 < y2 <= frame.shape[0]):
            raise ValueError(
                f"face box x {x1}..{x2}, y {y1}..{y2} of frame {i} holds no pixel of the "
                f"{frame.shape[1]}x{frame.shape[0]} picture"
            )
        crops[i] = cv2.resize(frame[y1:y2, x1:x2], (size, size), interpolation=cv2.INTER_LINEAR)
    return crops
