"""Key points from SimCC outputs: one distribution over x, one over y, for some networks one over depth."""

import cv2
import numpy as np

from preprocessing.pose import Crops
from preprocessing.types import Float, Frames, PreprocessProfile

DEPTH_RANGE_METRES = 2.1744869  # of RTMW3D: mmpose's SimCC3DLabel, z_range
_MEAN_RGB = np.array([0.485, 0.456, 0.406], np.float32)
_STD_RGB = np.array([0.229, 0.224, 0.225], np.float32)


def simcc_input(frames_rgb: Frames, crops: Crops, *, input_hw: tuple[int, int], profile: PreprocessProfile) -> Float:
    """Cut out one crop a frame by an affine map, as mmpose does: (T, 3, *input_hw) float32, black outside."""
    result = np.empty((len(frames_rgb), 3, *input_hw), np.float32)
    for target, frame, center, size in zip(result, frames_rgb, crops.center_xy, crops.size_wh, strict=True):
        gain = input_hw[1] / size[0]
        to_input = np.array(
            [[gain, 0, input_hw[1] / 2 - gain * center[0]], [0, gain, input_hw[0] / 2 - gain * center[1]]]
        )
        crop = cv2.warpAffine(frame, to_input, (input_hw[1], input_hw[0]), flags=cv2.INTER_LINEAR)
        ordered = crop if profile.pose_channel_order == "rgb" else crop[..., ::-1]
        target[:] = ((ordered / np.float32(255) - _MEAN_RGB) / _STD_RGB).transpose(2, 0, 1)
    return result


def decode_simcc(simcc_x: Float, simcc_y: Float, *, center_xy: Float, size_wh: Float) -> Float:
    """Locate the peaks: (N, K, bins of x), (N, K, bins of y) -> (N, K, 3) float32 x, y in frame pixels, score.

    The bins span the crop with this centre (N, 2) and size (N, 2). The score is the lower of the two peaks; points
    whose score is not positive are NaN with score 0 (arXiv:2107.03332; mmpose get_simcc_maximum).
    """
    bins = simcc_x.shape[2], simcc_y.shape[2]
    peaks = np.stack([simcc_x.argmax(axis=2), simcc_y.argmax(axis=2)], axis=2) / bins
    scores = np.minimum(simcc_x.max(axis=2), simcc_y.max(axis=2))
    xy_pixels = peaks * size_wh[:, None] + (center_xy - size_wh / 2)[:, None]
    found = (scores > 0)[..., None]
    xy_pixels, scores = np.where(found, xy_pixels, np.nan), np.maximum(scores, 0)
    return np.concatenate([xy_pixels, scores[..., None]], axis=2).astype(np.float32)


def decode_depth(simcc_z: Float) -> Float:
    """Locate depths in (N, K, bins): (N, K) float32, metres behind the middle of the hips (negative: in front).

    z = (bin / (bins / 2) - 1) * 2.1744869 (mmpose SimCC3DLabel; RTMW3D).
    """
    half = simcc_z.shape[2] / 2
    return np.asarray((simcc_z.argmax(axis=2) / half - 1) * DEPTH_RANGE_METRES, np.float32)
