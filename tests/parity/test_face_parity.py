import re

import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, picture

from preprocessing.face import crop_faces, face_boxes

GOLDEN = arrays("07_face")
BOXES = GOLDEN["face_bbox_x1x2y1y2"][:, [0, 2, 1, 3]]
CROPS = [key for key in GOLDEN if re.fullmatch(r"face\d+_f\d+_stride\d+", key)]


def test_face_boxes_match_the_original(metas):
    np.testing.assert_array_equal(face_boxes(metas, scale=float(GOLDEN["scale"]), profile=UPSTREAM), BOXES)


@pytest.mark.parametrize("key", CROPS)
def test_face_crop_matches_the_original(key):
    size, frame, stride = map(int, re.findall(r"\d+", key))
    crop = crop_faces(picture("01_frame_rgb.png")[None], BOXES[frame, None], size=size)[0]
    np.testing.assert_array_equal(crop[::stride, ::stride], GOLDEN[key])


def test_frames_that_crash_the_original_are_errors():
    for box in BOXES[(BOXES[:, 2:] <= BOXES[:, :2]).any(axis=1)]:
        with pytest.raises(ValueError, match="holds no pixel"):
            crop_faces(picture("01_frame_rgb.png")[None], box[None])


def test_the_default_profile_keeps_usable_boxes_and_replaces_the_others(metas):
    own = face_boxes(metas, scale=float(GOLDEN["scale"]))
    usable = (BOXES[:, 2:] - BOXES[:, :2] >= 8).all(axis=1) & (metas.face[:, 1:, 2].max(axis=1) > 0)
    assert usable.any()
    np.testing.assert_array_equal(own[usable], BOXES[usable])
    assert (own[:, 2:] > own[:, :2]).all()
