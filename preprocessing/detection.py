"""People in frames: what a YOLOv10-style detector sees and says, and the choice of one person."""

import cv2
import numpy as np

from preprocessing.types import Float, Frames, check_frames

MIN_SCORE = 0.05  # Wan2.2's; small or back-lit people score no more
_MAX_IOU = 0.5
_PERSON_CLASS = 0
_SIZE_RATIO = 0.4


def detector_input(frames_rgb: Frames, *, hw: tuple[int, int] = (640, 640)) -> Float:
    """Stretch (T, H, W, 3) frames to the network's input (T, 3, *hw): RGB float32 in 0..1."""
    check_frames(frames_rgb)
    result = np.empty((len(frames_rgb), 3, *hw), np.float32)
    for target, frame in zip(result, frames_rgb):
        resized = cv2.resize(frame, (hw[1], hw[0]), interpolation=cv2.INTER_LINEAR)
        for plane, channel in zip(target, cv2.split(resized)):
            np.divide(channel, np.float32(255), out=plane)
    return result


def decode_people(
    rows: Float, frame_hw: tuple[int, int], *, input_hw: tuple[int, int] = (640, 640)
) -> Float:
    """Turn one frame's detector rows into people, best score first.

    rows: (R, 6) x1, y1, x2, y2 in pixels of the network's input, score, class; unused rows are 0.
    Returns (K, 5) float64 x1, y1, x2, y2, score in pixels of the frame, after non-maximum suppression over
    all classes. As in Wan2.2, corner and size are truncated to whole pixels before it.
    """
    rows = rows[rows[:, 4] >= MIN_SCORE].astype(np.float64)
    scale_xyxy = np.array([frame_hw[1] / input_hw[1], frame_hw[0] / input_hw[0]] * 2)
    x1, y1, x2, y2 = (rows[:, :4] * scale_xyxy).T
    xywh = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).astype(np.int32)
    kept = np.asarray(cv2.dnn.NMSBoxes(xywh.tolist(), rows[:, 4].tolist(), MIN_SCORE, _MAX_IOU), np.int64)
    kept = kept[(rows[kept, 5].astype(np.int64) == _PERSON_CLASS) & (rows[kept, 4] > MIN_SCORE)]
    corner, size = xywh[kept, :2], xywh[kept, 2:]
    return np.concatenate([corner, corner + size, rows[kept, 4:5]], axis=1).astype(np.float64)


def select_person(people: Float, frame_hw: tuple[int, int]) -> Float:
    """Choose the main person of one frame: going down in score, each larger one replaces the choice.

    people: (K, 5) from `decode_people`. A box is passed over where its longer side is below 0.4 times that of
    the choice so far (at first: of anyone). Returns (5,); without people the whole frame with score -1.
    """
    if len(people) == 0:
        return np.array([0, 0, frame_hw[1], frame_hw[0], -1], np.float64)
    sizes = people[:, 2:4] - people[:, :2]
    longer_sides, areas = sizes.max(axis=1), sizes.prod(axis=1)
    best, best_area, longer_side = 0, 0.0, longer_sides.max()
    for i, area in enumerate(areas):
        if area > best_area and longer_sides[i] >= _SIZE_RATIO * longer_side:
            best, best_area, longer_side = i, area, longer_sides[i]
    return np.asarray(people[best])
