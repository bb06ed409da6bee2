"""Who is who from frame to frame: ByteTrack over the detector's boxes, gaps filled, boxes smoothed."""

from collections.abc import Mapping

import numpy as np

from preprocessing.detection import select_person
from preprocessing.types import Float

GAP_FRAMES = 8
"""Frames for which a person may go undetected; longer absences end a clip."""
_LOST_SECONDS = 1.0  # after a longer absence a person is a new one
_MIN_IOU = 0.1
_SMOOTHING_FRAMES, _SMOOTHING_ORDER = 9, 2


class PeopleTracker:
    """Gives each person of a shot one number, from 0 in the order of appearance, whatever the detector flickers.

    ByteTrack (arXiv:2110.06864) of the `trackers` package. Its thresholds are set to the detector's own lowest score:
    weak detectors, small and back-lit people score no more, and non-maximum suppression has already removed doubles.
    """

    def __init__(self, fps: float, *, min_score: float, first_number: int = 0) -> None:
        from trackers import ByteTrackTracker

        self._tracker = ByteTrackTracker(
            lost_track_buffer=max(1, round(fps * _LOST_SECONDS)),
            frame_rate=30.0,  # the buffer is meant in frames at 30 a second; ours is in frames already
            track_activation_threshold=min_score,
            minimum_consecutive_frames=1,
            minimum_iou_threshold=_MIN_IOU,
            high_conf_det_threshold=min_score,
        )
        self._numbers: dict[int, int] = {}
        self._first_number = first_number
        self._started = False

    @property
    def next_number(self) -> int:
        """The number that the next new person will get."""
        return self._first_number + len(self._numbers)

    def update(self, people: Float) -> dict[int, Float]:
        """Name the people (K, 5) of the next frame: number -> (5,) x1, y1, x2, y2, score."""
        import supervision

        people = np.asarray(people, np.float64).reshape(-1, 5)
        detections = supervision.Detections(
            xyxy=people[:, :4].astype(np.float32),
            confidence=people[:, 4].astype(np.float32),
            data={"row": np.arange(len(people))},
        )
        if not self._started and len(people):
            # trackers 2.6 names a person at the second sighting only: the first frame is shown to it twice.
            self._tracker.update(detections)
            self._started = True
        named = self._tracker.update(detections)
        result = {}
        raw_numbers = [] if named.tracker_id is None else named.tracker_id.tolist()
        for raw, row in zip(raw_numbers, named.data.get("row", ()), strict=True):
            if raw >= 0:
                number = self._numbers.setdefault(raw, self.next_number)
                result[number] = people[int(row)]
        return result


class PersonPerFrame:
    """The original's way: each frame's main person, chosen anew; they all count as one."""

    def __init__(self, frame_hw: tuple[int, int], *, number: int = 0) -> None:
        self._frame_hw = frame_hw
        self._number = number

    @property
    def next_number(self) -> int:
        """The number that a following shot's person gets."""
        return self._number + 1

    def update(self, people: Float) -> dict[int, Float]:
        """Choose among (K, 5) people; without any the whole frame with score -1, as the original goes on."""
        return {self._number: select_person(people, self._frame_hw)}


def fill_gap(boxes: dict[int, Float], frame: int, box: Float, *, last: int | None) -> None:
    """Add a track's box at `frame`, and those since frame `last`, where it was seen before, if few are missing.

    Filled boxes, scores included, lie on the line between the two.
    """
    if last is not None and 1 < frame - last <= GAP_FRAMES + 1 and last in boxes:
        for between in range(last + 1, frame):
            share = (between - last) / (frame - last)
            boxes[between] = (1 - share) * boxes[last] + share * box
    boxes[frame] = box


def smooth_boxes(boxes_xyxys: Float) -> Float:
    """Take the detector's jitter out of one track's (T, 5) boxes; scores stay.

    A Savitzky-Golay filter over 9 frames, which follows accelerations. Shorter clips stay as they are.
    """
    from scipy.signal import savgol_filter

    if len(boxes_xyxys) < _SMOOTHING_FRAMES:
        return boxes_xyxys
    smooth = boxes_xyxys.copy()
    smooth[:, :4] = savgol_filter(boxes_xyxys[:, :4], _SMOOTHING_FRAMES, _SMOOTHING_ORDER, axis=0)
    smooth[:, 2:4] = np.maximum(smooth[:, 2:4], smooth[:, :2] + 1)
    return smooth


def boxes_of(track: Mapping[int, Float], start: int, num_frames: int) -> Float:
    """Boxes of one track over a stretch: (num_frames, 5), NaN with score -1 where it is absent."""
    absent = np.array([np.nan, np.nan, np.nan, np.nan, -1.0])
    return np.stack([track.get(frame, absent) for frame in range(start, start + num_frames)])
