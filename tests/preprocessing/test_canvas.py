import numpy as np
import pytest

from preprocessing.canvas import canvas_hw, cover_resize, padding_resize, resize_by_area
from preprocessing.types import PROFILES


def test_a_canvas_of_its_own_area_keeps_its_size():
    """The original's float arithmetic makes 832x464 of it."""
    assert canvas_hw((832, 480), 832 * 480, 16) == (832, 480)
    assert canvas_hw((832, 480), 832 * 480, 16, profile=PROFILES["upstream"]) == (832, 464)


def test_canvas_sizes_divide_and_stay_below_the_area():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(100, 4000, (200, 2)).tolist():
        for divisor in (16, 32):
            new_height, new_width = canvas_hw((height, width), 832 * 480, divisor)
            assert new_height % divisor == new_width % divisor == 0
            assert new_height**2 * width <= 832 * 480 * height
            assert (new_height + divisor) ** 2 * width > 832 * 480 * height


def test_an_area_without_a_canvas_is_an_error():
    with pytest.raises(ValueError, match=r"a 4000x10 picture at 1000 pixels leaves .*give a larger area"):
        canvas_hw((10, 4000), 1000, 16)


def test_own_canvases_have_no_black_border():
    white = np.full((1080, 1918, 3), 255, np.uint8)
    assert resize_by_area(white, 480 * 832, 16).min() == 255
    assert resize_by_area(white, 480 * 832, 16, profile=PROFILES["upstream"]).min() == 0


def test_covering_cuts_equally_and_keeps_the_middle():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    assert (cover_resize(image, height=100, width=100) == 255).all()
    same = cover_resize(image, height=100, width=300)
    np.testing.assert_array_equal(same, image)


def test_padding_centres_the_picture():
    result = padding_resize(np.full((10, 10, 3), 9, np.uint8), height=10, width=16, color=(1, 2, 3))
    assert (result[:, :3] == (1, 2, 3)).all()
    assert (result[:, 3:13] == 9).all()
    assert (result[:, 13:] == (1, 2, 3)).all()
