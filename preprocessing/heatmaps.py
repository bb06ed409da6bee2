"""Key points out of the heatmaps of a pose network."""

import cv2
import numpy as np

from preprocessing.types import Float, Int

_BLUR_SIZE, _BLUR_SIGMA = 11, 2.0


def decode_heatmaps(heatmaps: Float, *, center_xy: Float, size_wh: Float) -> Float:
    """Locate the peak of each heatmap in the frame, to a fraction of a cell.

    heatmaps: (N, K, h, w) float32, each laid over a crop with this centre (N, 2) and size (N, 2) in frame
    pixels. Returns (N, K, 3) float32: x, y in frame pixels, score = the raw maximum.
    The peak is refined by one Newton step on the logarithm of the blurred map (DARK, arXiv:1910.06278, as in
    ViTPose without UDP); maps without a positive value decode to cell (-1, -1).
    """
    num, num_points, height, width = heatmaps.shape
    flat = heatmaps.reshape(num * num_points, height * width)
    cells = flat.argmax(axis=1)
    scores = flat[np.arange(len(flat)), cells]
    peak_xy = np.stack([cells % width, cells // width], axis=1).astype(np.float64)
    peak_xy[scores <= 0] = -1
    maps = heatmaps.reshape(-1, height, width)
    inner = (peak_xy > 1).all(axis=1) & (peak_xy < (width - 2, height - 2)).all(axis=1)
    peak_xy[inner] += _newton_steps(modulate(maps[inner]), peak_xy[inner].astype(np.int64))
    size_wh = size_wh[:, None]
    xy_pixels = peak_xy.reshape(num, num_points, 2) * (size_wh / (width, height))
    xy_pixels = xy_pixels + center_xy[:, None] - size_wh / 2
    return np.concatenate([xy_pixels, scores.reshape(num, num_points, 1)], axis=2).astype(np.float32)


def modulate(maps: Float) -> Float:
    """Blur (M, h, w) maps with zeros outside and scale each back to its old maximum."""
    radius = _BLUR_SIZE // 2
    num, height, width = maps.shape
    # One tall picture with zeros between the maps: one call of OpenCV for all of them.
    padded = np.zeros((num, height + 2 * radius, width + 2 * radius), np.float32)
    padded[:, radius : radius + height, radius : radius + width] = maps
    tall = padded.reshape(-1, width + 2 * radius)
    if num:
        tall = np.asarray(cv2.GaussianBlur(tall, (_BLUR_SIZE, _BLUR_SIZE), _BLUR_SIGMA))
    blurred = tall.reshape(padded.shape)[:, radius : radius + height, radius : radius + width]
    old, new = maps.max(axis=(1, 2), keepdims=True), blurred.max(axis=(1, 2), keepdims=True)
    ratio = np.divide(old, new, out=np.zeros_like(old), where=new != 0)
    return np.asarray(blurred * ratio)


def _newton_steps(maps: Float, cells_xy: Int) -> Float:
    """Return -H^-1 g, (M, 2) in cells: from a cell of each (M, h, w) map to the maximum of its logarithm."""
    log = np.log(np.maximum(maps, 1e-10))
    index, x, y = np.arange(len(maps)), cells_xy[:, 0], cells_xy[:, 1]

    def at(dx: int, dy: int) -> Float:
        return log[index, y + dy, x + dx].astype(np.float64)

    gx, gy = 0.5 * (at(1, 0) - at(-1, 0)), 0.5 * (at(0, 1) - at(0, -1))
    hxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0))
    hyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2))
    hxy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    det = hxx * hyy - hxy**2
    safe = np.where(det == 0, 1.0, det)
    step = np.stack([hxy * gy - hyy * gx, hxy * gx - hxx * gy], axis=1) / safe[:, None]
    return np.where(det[:, None] == 0, 0.0, step)
