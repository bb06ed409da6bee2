"""Shot boundaries, found while frames stream by."""

from collections.abc import Sequence

import cv2
import numpy as np

from preprocessing.types import Frames

_DETECTOR_WIDTH = 160  # cuts change whole pictures: details cost time and find nothing
_WINDOW_FRAMES = 2


class ShotDetector:
    """PySceneDetect's AdaptiveDetector over frames that are pushed in order.

    A change of content counts as a cut where it stands out from its neighbours, so that fast motion of the camera
    does not. A frame is `settled` once the neighbours that it is compared with were seen.
    """

    def __init__(self, fps: float) -> None:
        from scenedetect import AdaptiveDetector

        # No least length: a short shot that is merged into its neighbour gives clips with a cut inside.
        self._detector = AdaptiveDetector(window_width=_WINDOW_FRAMES, min_scene_len=1)
        self._fps = fps
        self._num_frames = 0
        self.cuts: set[int] = set()
        """First frames of new shots, counted from the first frame that was pushed."""

    def push(self, frames_rgb: Sequence[Frames] | Frames) -> None:
        """Look at the next frames, (T, H, W, 3) or a list of (H, W, 3)."""
        from scenedetect import FrameTimecode

        for frame in frames_rgb:
            timecode = FrameTimecode(self._num_frames, fps=self._fps)
            found = self._detector.process_frame(timecode, _shrunk_bgr(frame))
            self.cuts.update(cut.frame_num for cut in found)
            self._num_frames += 1

    @property
    def num_settled(self) -> int:
        """Frames, from the first, of which it is known whether a shot starts there."""
        return max(0, self._num_frames - _WINDOW_FRAMES)


def _shrunk_bgr(frame: Frames) -> Frames:
    height = max(8, round(frame.shape[0] * _DETECTOR_WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (_DETECTOR_WIDTH, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., ::-1])
