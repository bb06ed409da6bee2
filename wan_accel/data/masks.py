"""Growing person masks: dilation and block augmentation, drawn at random for training. Torch-free."""

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]  # (T, H, W) or (H, W), True = person


def dilate(mask: Mask, *, kernel_pixels: int, iterations: int) -> Mask:
    """Grow (T, H, W) masks `iterations` times by a square of `kernel_pixels`; 0 iterations change nothing."""
    if iterations <= 0:
        return mask.copy()
    kernel = np.ones((kernel_pixels, kernel_pixels), np.uint8)
    grown = [cv2.dilate(m.astype(np.uint8), kernel, iterations=iterations) for m in mask]
    return np.stack(grown).astype(bool)


def block_augment(mask: Mask, *, num_columns: int, num_rows: int) -> Mask:
    """Fill every grid cell of one (H, W) mask's bounding box that holds a person pixel.

    The box is cut into cells of 1 / num_columns by 1 / num_rows of its size, truncated to whole pixels (at
    least one), so there can be one narrower cell at the end; its last row and column belong to no cell (as
    in Wan2.2 utils.get_aug_mask). 1 x 1 gives a rectangle. An empty mask stays empty.
    """
    result = mask.copy()
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(xs) == 0:
        return result
    (y1, y2), (x1, x2) = (ys[0], ys[-1]), (xs[0], xs[-1])
    width, height = max(int((x2 - x1) / num_columns), 1), max(int((y2 - y1) / num_rows), 1)
    for x in range(x1, x2, width):
        for y in range(y1, y2, height):
            cell = result[y : min(y + height, y2), x : min(x + width, x2)]
            cell[:] = cell.any()
    return result
