"""One shot as it streams by: a short memory of frames, who is in them, the windows that become clips."""

from dataclasses import dataclass

import numpy as np

from preprocessing.tracking import GAP_FRAMES, PeopleTracker, PersonPerFrame, boxes_of, fill_gap
from preprocessing.types import Float, Frames
from preprocessing.windows import People, Window, WindowPlanner


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stretch:
    """The frames of a window: (T, H, W, 3), their times (T,), the person's boxes (T, 5), and everyone else's.

    boxes_xyxys is None where clips are not about people.
    """

    window: Window
    frames_rgb: Frames
    seconds: Float
    boxes_xyxys: Float | None
    others_xyxys: list[Float]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sighting:
    """One frame (H, W, 3) of a track that may serve as its reference, and where the person is in it (5,)."""

    track: int
    frame: int
    seconds: float
    frame_rgb: Frames
    box_xyxys: Float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Moment:
    frame_rgb: Frames
    seconds: float


class Shot:
    """Follows the people of one shot. Holds about as many frames as a window has, however long the shot is."""

    def __init__(
        self,
        *,
        first_frame: int,
        num_frames: int,
        stride: int,
        people: People,
        tracker: PeopleTracker | PersonPerFrame | None,
        sighting_every: int,
    ) -> None:
        """`sighting_every`: one in so many frames that no window holds is offered as a reference."""
        self._num_frames = num_frames
        self._planner = WindowPlanner(num_frames=num_frames, stride=stride, people=people, first_frame=first_frame)
        self._tracker = tracker
        self._sighting_every = sighting_every
        self._first_frame = self._next = first_frame
        self._moments: dict[int, _Moment] = {}
        self._tracks: dict[int, dict[int, Float]] = {}
        self._last_seen: dict[int, int] = {}
        self._used: dict[int, int] = {}  # track -> the end of its last window
        self.longest_run = 0
        """The most frames in a row that showed one person."""
        self._runs: dict[int, int] = {}

    @property
    def next_number(self) -> int:
        """The number that the next shot's first person gets."""
        return self._tracker.next_number if self._tracker else 0

    @property
    def end(self) -> int:
        """The frame after its last."""
        return self._next

    def add(self, frame_rgb: Frames, seconds: float, people: Float | None) -> None:
        """Take the shot's next frame and the people (K, 5) that were detected in it."""
        self._moments[self._next] = _Moment(frame_rgb=frame_rgb, seconds=seconds)
        if self._tracker is not None and people is not None:
            for number, box in self._tracker.update(people).items():
                self._see(number, box)
        self._next += 1

    def _see(self, number: int, box: Float) -> None:
        last = self._last_seen.get(number)
        boxes = self._tracks.setdefault(number, {})
        fill_gap(boxes, self._next, box, last=last)
        gap = self._next - last if last is not None else None
        self._runs[number] = self._runs.get(number, 0) + gap if gap and gap <= GAP_FRAMES + 1 else 1
        self.longest_run = max(self.longest_run, self._runs[number])
        self._last_seen[number] = self._next

    def stretches(self, *, ended: bool = False) -> list[Stretch]:
        """Return the windows that are complete by now. `ended`: no frame will be added."""
        settled = self._next if ended or self._tracker is None else self._next - GAP_FRAMES
        found = [self._stretch(window) for window in self._planner.advance(self._tracks, settled)]
        for stretch in found:
            self._used[stretch.window.track] = stretch.window.start + self._num_frames
        return found

    def _stretch(self, window: Window) -> Stretch:
        moments = [self._moments[f] for f in range(window.start, window.start + self._num_frames)]
        everyone = {n: boxes_of(boxes, window.start, self._num_frames) for n, boxes in self._tracks.items()}
        boxes = everyone.pop(window.track, None)
        return Stretch(
            window=window,
            frames_rgb=np.stack([m.frame_rgb for m in moments]),
            seconds=np.array([m.seconds for m in moments]),
            boxes_xyxys=boxes,
            others_xyxys=[b for b in everyone.values() if (b[:, 4] >= 0).any()],
        )

    def forget(self, *, ended: bool = False) -> list[Sighting]:
        """Drop frames that no window needs any more; return those that may serve as references."""
        # One frame more than can still be filled: filling needs the box before the gap.
        settled = self._next - GAP_FRAMES - 1
        keep_from = self._next if ended else self._planner.first_needed(self._tracks, settled)
        sightings = []
        for frame in sorted(f for f in self._moments if f < keep_from):
            moment = self._moments.pop(frame)
            offered = (frame - self._first_frame) % self._sighting_every == 0
            for number, boxes in self._tracks.items():
                box = boxes.pop(frame, None)
                if box is not None and offered and box[4] > 0 and frame >= self._used.get(number, frame):
                    sightings.append(
                        Sighting(
                            track=number, frame=frame, seconds=moment.seconds, frame_rgb=moment.frame_rgb, box_xyxys=box
                        )
                    )
        self._tracks = {n: b for n, b in self._tracks.items() if b or self._alive(n)}
        return sightings

    def is_over(self, number: int) -> bool:
        """Say whether a track has left: no later frame will add to it."""
        return number not in self._tracks

    def _alive(self, number: int) -> bool:
        return self._next - self._last_seen[number] <= GAP_FRAMES + 1
