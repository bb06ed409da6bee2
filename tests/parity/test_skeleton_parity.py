import re

import numpy as np
import pytest
from preprocess_goldens import GOLDENS, arrays, hw, picture

from preprocessing.pose import pose62_from_metas
from preprocessing.skeleton import draw_pose

DRAWINGS = sorted(p.name for p in GOLDENS.glob("06_pose_f*.png") if "padded" not in p.name)


def test_there_are_drawings():
    assert DRAWINGS


@pytest.mark.parametrize("path", DRAWINGS)
def test_drawing_matches_the_original_to_the_pixel(metas, path):
    expected = picture(path)
    pose = pose62_from_metas(metas)[int(re.search(r"_f(\d+)", path)[1])]
    source_hw = hw(arrays("01_inputs")["src_wh"])
    pose[:, :2] *= np.array(expected.shape[1::-1]) / source_hw[::-1]
    plain = "nohead_nohand" in path
    result = draw_pose(pose, expected.shape[:2], draw_head=not plain, draw_hands=not plain)
    np.testing.assert_array_equal(result, expected)
