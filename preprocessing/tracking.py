"""Follow one person through a video's detections."""

from itertools import pairwise

import numpy as np

from preprocessing.detection import select_person
from preprocessing.types import Float, Int

_MIN_IOU = 0.2
# Frames without a matching box after which the person counts as gone and the largest one is followed anew.
_PATIENCE = 15


def follow_largest(people: list[Float], frame_hw: tuple[int, int]) -> Float:
    """Choose the main person of the first frame that has one, then the box that overlaps most with the last.

    Args:
        people: a frame's boxes (K, 5), x1 y1 x2 y2 score in pixels, for each of T frames.
        frame_hw: height and width of the frames.

    Returns:
        (T, 5) float64; score -1 where the person is not found.
    """
    nobody: Float = np.array([0, 0, frame_hw[1], frame_hw[0], -1], np.float64)
    boxes, last, missed = [], None, 0
    for found in people:
        box = nobody
        if last is not None and len(found):
            overlaps = iou(last, found)
            if overlaps.max() >= _MIN_IOU:
                box = found[int(overlaps.argmax())]
        if last is None or (box[4] < 0 and missed >= _PATIENCE):
            box = select_person(found, frame_hw)
        missed = missed + 1 if box[4] < 0 else 0
        last = box if box[4] >= 0 else last
        boxes.append(box)
    return np.stack(boxes)


def track_numbers(boxes: Float) -> Int:
    """Number the people that `follow_largest` followed: (T,) from 0, one more after each long absence.

    After it the person may be another one, so clips and references must not reach across.
    """
    numbers = np.zeros(len(boxes), np.int64)
    found = np.flatnonzero(boxes[:, 4] >= 0)
    for before, after in pairwise(found):
        if after - before > _PATIENCE:
            numbers[after:] += 1
    return numbers


def iou(box: Float, others: Float) -> Float:
    """Overlap of a box (>= 4,) with others (K, >= 4), x1 y1 x2 y2: intersection over union, (K,)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    intersection = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:4] - others[:, :2]).prod(axis=1) + (box[2:4] - box[:2]).prod()
    return intersection / np.maximum(areas - intersection, 1e-9)
