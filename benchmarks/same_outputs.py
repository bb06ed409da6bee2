"""Whether two ways of preprocessing measure the same on the same frames."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from original_way import Measured

from wan_accel.data.schema import unpack_mask

# Tolerance, and the share of values within it: those of the goldens' READMEs. A peak may fall into a neighbouring cell,
# and pixels on a mask's edge are decided by last bits.
TOLERANCES = {
    "boxes, pixels": (1.0, 0.99),
    "face boxes, pixels": (1.0, 0.99),
    "key points, pixels": (0.02, 0.99),
    "scores": (1e-3, 0.99),
    "masks": (0.0, 0.9999),
}


def agree(name: str, rows: list[Mapping[str, Any]], expected: Measured) -> bool:
    """Compare the clips of a video with all its frames, and print how far they are apart."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {what: [] for what in TOLERANCES}
    for row in rows:
        start = round(row["source"]["start_seconds"] * row["fps"])
        frames = slice(start, start + row["num_frames"])
        mask = unpack_mask(row["mask"], (row["num_frames"], row["height"], row["width"]))
        found["boxes, pixels"].append((row["boxes"][:, :4], expected.boxes[frames, :4]))
        found["face boxes, pixels"].append((row["face_boxes"], expected.face_boxes[frames]))
        found["key points, pixels"].append((row["keypoints"][..., :2], expected.keypoints[frames, :, :2]))
        found["scores"].append((row["keypoints"][..., 2], expected.keypoints[frames, :, 2]))
        found["masks"].append((mask, expected.masks[frames]))
    close = [_is_close(name, what, pairs) for what, pairs in found.items()]
    return all(close)


def _is_close(name: str, what: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    tolerance, least_share = TOLERANCES[what]
    distance = np.concatenate([np.abs(np.asarray(a, float) - np.asarray(b, float)).ravel() for a, b in pairs])
    share, is_close = float((distance <= tolerance).mean()), bool((distance <= tolerance).mean() >= least_share)
    verdict = "equal" if is_close else "DIFFERENT"
    print(f"{name}: {what}: {verdict}; {share:.3%} within {tolerance:g}, at most {distance.max():.2g} apart")
    return is_close
