"""Peaks are refined on blurred cells; only those around a peak are blurred."""

import numpy as np

from preprocessing.heatmaps import blurred_near, decode_heatmaps, modulate


def test_cells_around_a_peak_are_blurred_as_in_the_whole_map():
    maps = np.random.default_rng(0).random((9, 64, 48), np.float32)
    cells_xy = np.array([[2, 2], [45, 61], [20, 30], [2, 61]])
    chosen = np.array([0, 3, 5, 8])
    near = blurred_near(maps, chosen, cells_xy)
    for values, whole, (x, y) in zip(near, modulate(maps[chosen]), cells_xy, strict=True):
        expected = whole[y - 2 : y + 3, x - 2 : x + 3]
        np.testing.assert_allclose(values / values[2, 2], expected / expected[2, 2], rtol=1e-5)


def test_maps_with_values_below_the_least_are_worked_on_whole():
    """How small is too small depends on the map's maximum, which may lie anywhere."""
    y, x = np.mgrid[:64, :48]
    maps = (1e-3 * np.exp(-((x - 20.3) ** 2 + (y - 30.8) ** 2) / 2) - 2e-4).astype(np.float32)[None]
    assert blurred_near(maps, np.array([0]), np.array([[20, 31]])).min() < 0
    log = np.log(np.maximum(modulate(maps)[0].astype(np.float64), 1e-10))
    (found,) = decode_heatmaps(maps[None], center_xy=np.array([[24.0, 32]]), size_wh=np.array([[48.0, 64]]))[0]
    gradient = 0.5 * np.array([log[31, 21] - log[31, 19], log[32, 20] - log[30, 20]])
    hxx = 0.25 * (log[31, 22] - 2 * log[31, 20] + log[31, 18])
    hyy = 0.25 * (log[33, 20] - 2 * log[31, 20] + log[29, 20])
    hxy = 0.25 * (log[32, 21] - log[30, 21] - log[32, 19] + log[30, 19])
    expected = [20, 31] - np.linalg.solve([[hxx, hxy], [hxy, hyy]], gradient)
    np.testing.assert_allclose(found[:2], expected, atol=1e-4)
