"""Key points out of the heatmaps of a pose network."""

import cv2
import numpy as np

from preprocessing.types import Float, Int

_BLUR_SIZE, _BLUR_SIGMA = 11, 2.0
_KERNEL = cv2.getGaussianKernel(_BLUR_SIZE, _BLUR_SIGMA, cv2.CV_32F).ravel().tolist()
_REACH = 2  # cells around a peak that its refinement looks at
_LEAST = 1e-10  # smaller values count as this much: they have no logarithm


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
    inner = np.flatnonzero((peak_xy > 1).all(axis=1) & (peak_xy < (width - 2, height - 2)).all(axis=1))
    peak_xy[inner] += _newton_steps(_around_peaks(maps, inner, peak_xy[inner].astype(np.int64)))
    size_wh = size_wh[:, None]
    xy_pixels = peak_xy.reshape(num, num_points, 2) * (size_wh / (width, height))
    xy_pixels = xy_pixels + center_xy[:, None] - size_wh / 2
    return np.concatenate([xy_pixels, scores.reshape(num, num_points, 1)], axis=2).astype(np.float32)


def _around_peaks(maps: Float, chosen: Int, cells_xy: Int) -> Float:
    """The 5x5 cells around a cell of each of maps[chosen], as `modulate` gives them up to a factor: (M, 5, 5).

    A factor does not matter to the slope of a logarithm. Where a value is too small for one, which happens in maps of
    noise, the whole map is worked on, for the factor decides how small is too small.
    """
    near = blurred_near(maps, chosen, cells_xy)
    small = np.flatnonzero(near.min(axis=(1, 2)) <= _LEAST)
    if len(small):
        rows, columns = _neighbours(cells_xy[small], _REACH)
        near[small] = modulate(maps[chosen[small]])[np.arange(len(small))[:, None, None], rows, columns]
    return near


def blurred_near(maps: Float, chosen: Int, cells_xy: Int) -> Float:
    """Blur maps[chosen] at the 5x5 cells around one cell of each, with zeros outside: (M, 5, 5) float64.

    Whole maps would take a core 30 ms a frame, these cells take 3.
    """
    height, width = maps.shape[1:]
    rows, columns = _neighbours(cells_xy, _REACH + _BLUR_SIZE // 2)
    patches = maps[chosen[:, None, None], rows.clip(0, height - 1), columns.clip(0, width - 1)].astype(np.float64)
    patches *= (rows >= 0) & (rows < height)
    patches *= (columns >= 0) & (columns < width)
    num = 2 * _REACH + 1
    across = sum(weight * patches[:, :, i : i + num] for i, weight in enumerate(_KERNEL))
    return np.asarray(sum(weight * across[:, i : i + num] for i, weight in enumerate(_KERNEL)))


def _neighbours(cells_xy: Int, reach: int) -> tuple[Int, Int]:
    """Rows (M, n, 1) and columns (M, 1, n) of the cells up to `reach` away."""
    steps = np.arange(-reach, reach + 1)
    return (cells_xy[:, 1:] + steps)[:, :, None], (cells_xy[:, :1] + steps)[:, None, :]


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


def _newton_steps(near: Float) -> Float:
    """Return -H^-1 g, (M, 2) in cells: from the middle of (M, 5, 5) cells to the maximum of their logarithm."""
    log = np.log(np.maximum(near, _LEAST))

    def at(dx: int, dy: int) -> Float:
        return log[:, _REACH + dy, _REACH + dx]

    gx, gy = 0.5 * (at(1, 0) - at(-1, 0)), 0.5 * (at(0, 1) - at(0, -1))
    hxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0))
    hyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2))
    hxy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    det = hxx * hyy - hxy**2
    safe = np.where(det == 0, 1.0, det)
    step = np.stack([hxy * gy - hyy * gx, hxy * gx - hxx * gy], axis=1) / safe[:, None]
    return np.where(det[:, None] == 0, 0.0, step)
