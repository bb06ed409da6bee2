"""Masks of a person through a whole clip by a video segmenter, chunk by chunk."""

import time
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.masks import Mask
from preprocessing.prompts import FramePrompt, frame_prompts
from preprocessing.types import WAN, Frames, Person, PreprocessProfile, check_frames

CHUNK_FRAMES = 400
HOLE_CELLS = 8  # of the network's own mask, which is a quarter of its input's size
_IN_HOLE = 0.1  # a score just inside the person


class Propagator(Protocol):
    """Spreads prompts in some frames (T, H, W, 3) over all of them: (T, H, W) masks.

    first_mask: (H, W), the person's mask in frame 0 where it is known.
    """

    def __call__(self, frames_rgb: Frames, prompts: Sequence[FramePrompt], first_mask: Mask | None) -> Mask: ...


class VideoSegmenter:
    """Segments one person with a video segmenter. `seconds_in_network`: how long it has run in all."""

    def __init__(
        self, propagator: Propagator, *, profile: PreprocessProfile = WAN, chunk_frames: int = CHUNK_FRAMES
    ) -> None:
        """chunk_frames: frames that the network remembers at a time; 2 at least."""
        if chunk_frames < 2:
            raise ValueError(f"chunks of {chunk_frames} frames cannot hand anything on: give 2 or more")
        self._propagator, self._profile, self._chunk_frames = propagator, profile, chunk_frames
        self.seconds_in_network = 0.0

    def __call__(self, frames_rgb: Frames, person: Person, others: Sequence[Person] = ()) -> Mask:
        """Return (T, H, W) masks of the person; empty where nothing is known of them.

        With `wan` a chunk begins with the last frame and mask of the one before, which carries the identity over;
        with `upstream` every chunk starts anew.
        """
        check_frames(frames_rgb)
        masks = np.zeros(frames_rgb.shape[:3], bool)
        for chunk in segmenter_chunks(len(frames_rgb), chunk_frames=self._chunk_frames, overlap=self._overlap):
            known = masks[chunk.start] if self._overlap and chunk.start > 0 else None
            if known is not None and not known.any():
                known = None  # lost there: prompts alone find the person again
            masks[chunk.start : chunk.stop] = self._chunk(frames_rgb, person, others, chunk, known)
        return masks

    def _chunk(
        self, frames_rgb: Frames, person: Person, others: Sequence[Person], chunk: range, known: Mask | None
    ) -> Mask:
        frames = frames_rgb[chunk.start : chunk.stop]
        prompts = frame_prompts(
            person.part(chunk), [other.part(chunk) for other in others], frames.shape[1:3], profile=self._profile
        )
        if known is not None:
            prompts = [prompt for prompt in prompts if prompt.frame > 0]
        if not prompts and known is None:
            return np.zeros(frames.shape[:3], bool)
        start = time.perf_counter()
        masks = self._propagator(frames, prompts, known)
        self.seconds_in_network += time.perf_counter() - start
        return masks

    @property
    def _overlap(self) -> int:
        return 0 if self._profile.segmenter_points == "all_points" else 1


def segmenter_chunks(num_frames: int, *, chunk_frames: int = CHUNK_FRAMES, overlap: int = 0) -> list[range]:
    """Split a clip into pieces of at most `chunk_frames`; each begins with the last `overlap` frames of the one before.

    Without an overlap these are the pieces that the original segments on their own.
    """
    starts = range(0, max(num_frames - overlap, 1), chunk_frames - overlap)
    return [range(start, min(start + chunk_frames, num_frames)) for start in starts]


def fill_small_holes(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lift regions of at most 8 cells outside the person, (H, W) scores <= 0, just above 0.

    SAM2 has this as a CUDA extension only, and leaves it out with a warning where that was not built.
    """
    num, labels, stats, _ = cv2.connectedComponentsWithStats((scores <= 0).astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] <= HOLE_CELLS
    small[0] = False  # the person
    return np.where(small[labels], np.float32(_IN_HOLE), scores) if num > 1 else scores
