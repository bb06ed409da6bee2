import math

import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, frame_number, names, picture

from preprocessing.canvas import canvas_hw, padding_resize, resize_by_area
from preprocessing.pose import pose62_from_metas
from preprocessing.skeleton import draw_pose

(SMALL,) = names("09_small_*.png")


def test_canvas_sizes_match_the_original():
    golden = arrays("09_resize")
    column = {str(name): i for i, name in enumerate(golden["columns"])}
    for row in golden["rows"]:
        width, height, area, divisor = (int(row[column[name]]) for name in ("w", "h", "area", "divisor"))
        expected = int(row[column["resize_by_area_h"]]), int(row[column["resize_by_area_w"]])
        assert canvas_hw((height, width), area, divisor, profile=UPSTREAM) == expected


@pytest.mark.parametrize("path", names("09_resize_by_area_*.png"))
def test_pictures_of_resize_by_area_match_the_original(path):
    small, expected = picture(SMALL), picture(path)
    height, width = expected.shape[:2]
    # The area is not recorded; all that lead to this size give this picture. This is the smallest of them.
    aspect = small.shape[1] / small.shape[0]
    area = math.ceil(max(height**2 * aspect, width**2 / aspect)) + 1
    result = resize_by_area(small, area, math.gcd(height, width), profile=UPSTREAM)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("path", names("09_padding_resize_*.png"))
def test_pictures_of_padding_resize_match_the_original(path):
    expected = picture(path)
    height, width = expected.shape[:2]
    color = tuple(map(int, expected[-1, -1]))  # what is left over goes to the right and the bottom
    result = padding_resize(picture(SMALL), height=height, width=width, color=color)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("path", names("06_pose_f*_padded_to_ref*.png"))
def test_a_drawing_fitted_to_the_reference_matches_the_original(metas, path):
    expected = picture(path)
    drawing = draw_pose(pose62_from_metas(metas)[frame_number(path)], (metas.height, metas.width))
    result = padding_resize(drawing, height=expected.shape[0], width=expected.shape[1])
    np.testing.assert_array_equal(result, expected)
