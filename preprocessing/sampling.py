"""Which frames of a video to take: by time, or by average rate as the original does."""

import math

import numpy as np

from preprocessing.types import Float, Int

_TIME_TOLERANCE_SECONDS = 1e-6


def sample_indices(num_frames: int, *, video_fps: float, target_fps: float, duration_seconds: float) -> Int:
    """Choose frames for `target_fps` (-1: the video's own) from the average rate, as Wan2.2 does.

    Returns int64 indices, all < num_frames. Assumes a constant frame rate; see `sample_indices_by_time`.
    """
    expected = int(duration_seconds * video_fps + 0.5)
    # The original then samples `expected` frames and may read beyond the end; the clip below keeps it inside.
    counted = expected if abs(num_frames - expected) / num_frames > 0.1 else num_frames
    fps = video_fps if target_fps == -1 else target_fps
    num_samples = int(counted / video_fps * fps)
    indices = np.round(np.arange(num_samples) / fps * video_fps).astype(np.int64)
    return np.clip(indices, 0, num_frames - 1)


def sample_indices_by_time(
    pts_seconds: Float,
    *,
    target_fps: float,
    start_seconds: float | None = None,
    num_samples: int | None = None,
) -> Int:
    """Choose the frame nearest to each instant start + i / target_fps; correct for variable frame rates.

    `start_seconds` defaults to the first frame. Without `num_samples`, instants run while they lie less than
    half a target period after the last frame. Returns int64 indices; a tie goes to the later frame.
    """
    if target_fps <= 0:
        raise ValueError(f"target_fps={target_fps}: give a positive number of frames a second")
    start = float(pts_seconds[0]) if start_seconds is None else start_seconds
    if num_samples is None:
        span = float(pts_seconds[-1]) - start
        num_samples = max(0, math.floor(span * target_fps + 0.5 - _TIME_TOLERANCE_SECONDS) + 1)
    instants = start + np.arange(num_samples) / target_fps
    midpoints = (pts_seconds[1:] + pts_seconds[:-1]) / 2
    return np.searchsorted(midpoints, instants + _TIME_TOLERANCE_SECONDS, side="right").astype(np.int64)
