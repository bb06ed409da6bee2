import numpy as np
import pytest
from preprocess_goldens import GOLDENS, UPSTREAM, arrays, picture

from preprocessing.canvas import canvas_hw, padding_resize, resize_by_area
from preprocessing.pose import pose62_from_metas
from preprocessing.skeleton import draw_pose


def test_canvas_sizes_match_the_original():
    golden = arrays("09_resize")
    column = {str(name): i for i, name in enumerate(golden["columns"])}
    for row in golden["rows"]:
        width, height, area, divisor = (int(row[column[name]]) for name in ("w", "h", "area", "divisor"))
        expected = int(row[column["resize_by_area_h"]]), int(row[column["resize_by_area_w"]])
        assert canvas_hw((height, width), area, divisor, profile=UPSTREAM) == expected


@pytest.mark.parametrize("path", sorted(p.name for p in GOLDENS.glob("09_resize_by_area_*.png")))
def test_pictures_of_resize_by_area_match_the_original(path):
    # 09_resize_by_area_<a>x<b>_div<divisor>: the area is a * b
    *_, sizes, divisor = path.removesuffix(".png").split("_")
    a, b = map(int, sizes.split("x"))
    (small,) = GOLDENS.glob("09_small_*.png")
    result = resize_by_area(picture(small.name), a * b, int(divisor.removeprefix("div")), profile=UPSTREAM)
    np.testing.assert_array_equal(result, picture(path))


@pytest.mark.parametrize("path", sorted(p.name for p in GOLDENS.glob("09_padding_resize_*.png")))
def test_pictures_of_padding_resize_match_the_original(path):
    expected = picture(path)
    (small,) = GOLDENS.glob("09_small_*.png")
    height, width = expected.shape[:2]
    color = tuple(map(int, expected[0, 0])) if (expected[0, 0] == expected[-1, -1]).all() else (0, 0, 0)
    result = padding_resize(picture(small.name), height=height, width=width, color=color)
    np.testing.assert_array_equal(result, expected)


def test_a_drawing_fitted_to_the_reference_matches_the_original(metas):
    (path,) = GOLDENS.glob("06_pose_f00_padded_to_ref*.png")
    expected = picture(path.name)
    drawing = draw_pose(pose62_from_metas(metas)[0], (metas.height, metas.width))
    result = padding_resize(drawing, height=expected.shape[0], width=expected.shape[1])
    np.testing.assert_array_equal(result, expected)
