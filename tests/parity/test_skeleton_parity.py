import numpy as np
import pytest
from preprocess_goldens import frame_number, names, picture

from preprocessing.pose import pose62_from_metas
from preprocessing.skeleton import draw_pose

DRAWINGS = [name for name in names("06_pose_f*.png") if "padded" not in name]


@pytest.mark.parametrize("path", DRAWINGS)
def test_drawing_matches_the_original_to_the_pixel(metas, path):
    expected = picture(path)
    pose = pose62_from_metas(metas)[frame_number(path)]
    pose[:, :2] *= np.array(expected.shape[1::-1]) / (metas.width, metas.height)
    result = draw_pose(
        pose, expected.shape[:2], draw_head="nohead" not in path, draw_hands="nohand" not in path
    )
    np.testing.assert_array_equal(result, expected)
