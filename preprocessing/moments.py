"""The frames of a video as they are looked at: decoded, resized, searched for cuts and people, ahead of the rest."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from preprocessing.ahead import ahead
from preprocessing.canvas import canvas_hw, resize_by_area
from preprocessing.networks import PersonFinder
from preprocessing.scenes import ShotDetector
from preprocessing.settings import Settings
from preprocessing.types import Float, FrameBatch, Frames, Int, PreprocessProfile
from preprocessing.video import VideoInfo, stream_frames

_BATCH_FRAMES = 8  # where no network says how many it takes; at the source's size a frame may have 25 MB


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moment:
    """One frame (H, W, 3) of a video, the people (K, 5) in it, and whether a shot starts with it.

    people is None where none were looked for.
    """

    frame_rgb: Frames
    seconds: float
    people: Float | None
    starts_shot: bool


def look(
    info: VideoInfo, indices: Int, settings: Settings, profile: PreprocessProfile, detector: PersonFinder | None
) -> Generator[list[Moment], None, None]:
    """Yield all frames `indices` in order, some at a time: those of which it is known whether a shot starts there.

    Decoding goes on in a thread, the detector's batches in others. Closing the generator ends them.
    Raises UserVideoError where a frame does not decode; those before it were given.
    """
    num_frames = _BATCH_FRAMES if detector is None else detector.batch_frames
    waiting = _Waiting(ShotDetector(settings.fps) if profile.shots == "split" else None)
    with closing(ahead(_resized(info, indices, settings, profile, num_frames))) as batches:
        for batch, people in detector.look(batches) if detector else zip(batches, repeat(None)):
            waiting.add(batch, people)
            yield waiting.settled()
    yield waiting.settled(ended=True)


class _Waiting:
    """Frames that were looked at, until it is known whether a shot starts with them."""

    def __init__(self, shots: ShotDetector | None) -> None:
        self._shots = shots
        self._frames: deque[tuple[Frames, float, Float | None]] = deque()
        self._num_given = 0

    def add(self, batch: FrameBatch, people: list[Float] | None) -> None:
        """Take the next frames, with the people in each."""
        if self._shots is not None:
            self._shots.push(batch.frames_rgb)
        self._frames.extend(zip(batch.frames_rgb, batch.pts_seconds.tolist(), people or repeat(None)))

    def settled(self, *, ended: bool = False) -> list[Moment]:
        """Give those that are known about by now; all of them where no more will come."""
        num = len(self._frames)
        if self._shots is not None and not ended:
            num = max(0, self._shots.num_settled - self._num_given)
        return [self._next() for _ in range(num)]

    def _next(self) -> Moment:
        frame, seconds, people = self._frames.popleft()
        starts = self._num_given > 0 and self._shots is not None and self._num_given in self._shots.cuts
        self._num_given += 1
        return Moment(frame_rgb=frame, seconds=seconds, people=people, starts_shot=starts)


def frame_hw(info: VideoInfo, settings: Settings, profile: PreprocessProfile) -> tuple[int, int]:
    """Height and width of a video's frames as they are looked at."""
    source_hw = (info.height, info.width)
    if _keeps_size(settings, profile):
        return source_hw
    return canvas_hw(source_hw, settings.area, settings.divisor, profile=profile)


def _keeps_size(settings: Settings, profile: PreprocessProfile) -> bool:
    return settings.purpose == "drive" and profile.driving_frames == "as_decoded"


def _resized(
    info: VideoInfo, indices: Int, settings: Settings, profile: PreprocessProfile, num_frames: int
) -> Iterator[FrameBatch]:
    for batch in stream_frames(info.path, indices, chunk_frames=num_frames):
        if _keeps_size(settings, profile):
            yield batch
            continue
        frames = [resize_by_area(f, settings.area, settings.divisor, profile=profile) for f in batch.frames_rgb]
        yield FrameBatch(frames_rgb=np.stack(frames), pts_seconds=batch.pts_seconds)
