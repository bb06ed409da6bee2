"""Which frame of a track shows its person best: kept while the track streams by."""

from dataclasses import dataclass

import numpy as np

from preprocessing.types import Float, Frames

_BUCKETS_PER_WINDOW = 4
_KEPT_BUCKETS = 2 * _BUCKETS_PER_WINDOW
_NUM_BODY = 17


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """A frame (H, W, 3) at `seconds` of the source, with the score of the person in it."""

    frame: int
    seconds: float
    score: float
    picture_rgb: Frames


class References:
    """The best frames of one track, far enough apart that some lie outside any window.

    A bucket is a quarter of a window; the best frame of each of the 8 best buckets is kept, while a window touches 5
    at most.
    """

    def __init__(self, num_frames: int) -> None:
        self._bucket_frames = max(1, num_frames // _BUCKETS_PER_WINDOW)
        self._best: dict[int, Candidate] = {}
        self.first: Candidate | None = None

    def offer(self, *, frames: range, seconds: Float, frames_rgb: Frames, keypoints: Float) -> None:
        """Consider measured frames: times (T,), pictures (T, H, W, 3), key points (T, 133, 3)."""
        scores = body_scores(keypoints)
        for i, frame in enumerate(frames):
            bucket = frame // self._bucket_frames
            best = self._best.get(bucket)
            is_first = self.first is None or frame < self.first.frame
            if not is_first and best is not None and scores[i] <= best.score:
                continue
            candidate = Candidate(
                frame=frame, seconds=float(seconds[i]), score=float(scores[i]), picture_rgb=frames_rgb[i].copy()
            )
            if best is None or scores[i] > best.score:
                self._best[bucket] = candidate
            if is_first:
                self.first = candidate
        ranked = sorted(self._best, key=lambda bucket: -self._best[bucket].score)
        self._best = {bucket: self._best[bucket] for bucket in sorted(ranked[:_KEPT_BUCKETS])}

    def best_for(self, window: range) -> Candidate:
        """Return the best frame outside a window, or inside where there is no other."""
        outside = [c for c in self._best.values() if c.frame not in window]
        return max(outside or self._best.values(), key=lambda candidate: candidate.score)


def body_scores(keypoints: Float) -> Float:
    """Return the mean score of the 17 body points of each frame: (T, 133, 3) -> (T,)."""
    return np.asarray(keypoints[:, :_NUM_BODY, 2].mean(axis=1))
