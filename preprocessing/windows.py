"""Where clips start: windows of a fixed number of frames, planned while a shot streams by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocessing.types import Float

People = Literal["largest", "all", "none"]
Tracks = Mapping[int, Mapping[int, Float]]
"""Track number -> frame -> box (5,): who is where."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Window:
    """Frames start .. start + num_frames - 1 of a shot, for one track; -1: of no person in particular."""

    start: int
    track: int


class WindowPlanner:
    """Chooses windows that show a person throughout, greedily from the start of a shot.

    `largest`: windows one after the other, each for the person whose boxes are largest among those that are in it
    throughout. `all`: the same for every person on their own. `none`: people do not matter.
    The next window starts `stride` frames later; where a person is missing, after the missing frame.
    """

    def __init__(self, *, num_frames: int, stride: int, people: People, first_frame: int = 0) -> None:
        self._num_frames = num_frames
        self._stride = stride
        self._people = people
        self._cursor = first_frame
        self._cursors: dict[int, int] = {}  # of each track, for `all`

    def advance(self, tracks: Tracks, num_settled: int) -> list[Window]:
        """Return the windows that lie within frames < num_settled, whose boxes are final."""
        if self._people == "all":
            return sorted(w for number in tracks for w in self._of_track(number, tracks[number], num_settled))
        windows = []
        while self._cursor + self._num_frames <= num_settled:
            if self._people == "none":
                windows.append(Window(start=self._cursor, track=-1))
                self._cursor += self._stride
                continue
            last_missing = {n: self._last_missing(boxes, self._cursor) for n, boxes in tracks.items()}
            whole = [number for number, missing in last_missing.items() if missing is None]
            if whole:
                windows.append(Window(start=self._cursor, track=self._largest(tracks, whole)))
                self._cursor += self._stride
            else:
                end = self._cursor + self._num_frames
                self._cursor = min([m + 1 for m in last_missing.values() if m is not None], default=end)
        return windows

    def first_needed(self, tracks: Tracks, num_settled: int) -> int:
        """The earliest frame that a window to come may hold."""
        if self._people != "all":
            return min(self._cursor, num_settled)
        running = [c for n, c in self._cursors.items() if n in tracks and max(tracks[n], default=-1) >= c]
        return min([*running, num_settled])

    def _of_track(self, number: int, boxes: Mapping[int, Float], num_settled: int) -> list[Window]:
        windows = []
        cursor = self._cursors.get(number, min(boxes, default=num_settled))
        while cursor + self._num_frames <= num_settled:
            missing = self._last_missing(boxes, cursor)
            if missing is None:
                windows.append(Window(start=cursor, track=number))
                cursor += self._stride
            else:
                cursor = missing + 1
        self._cursors[number] = cursor
        return windows

    def _last_missing(self, boxes: Mapping[int, Float], start: int) -> int | None:
        frames = range(start + self._num_frames - 1, start - 1, -1)
        return next((frame for frame in frames if frame not in boxes), None)

    def _largest(self, tracks: Tracks, numbers: list[int]) -> int:
        frames = range(self._cursor, self._cursor + self._num_frames)

        def area(number: int) -> float:
            boxes = np.stack([tracks[number][frame] for frame in frames])
            return float((boxes[:, 2:4] - boxes[:, :2]).prod(axis=1).mean())

        return max(sorted(numbers), key=area)
