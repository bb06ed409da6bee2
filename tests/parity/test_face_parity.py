import re
from dataclasses import replace

import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, picture

from preprocessing.face import crop_faces, face_boxes
from preprocessing.types import WAN

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


def test_faces_without_pixels_can_be_replaced_and_the_others_kept(metas):
    own = face_boxes(metas, scale=float(GOLDEN["scale"]), profile=replace(WAN, face_crops="stretched"))
    usable = (BOXES[:, 2:] - BOXES[:, :2] >= 8).all(axis=1) & (metas.face[:, 1:, 2].max(axis=1) > 0)
    assert usable.any()
    np.testing.assert_array_equal(own[usable], BOXES[usable])
    assert (own[:, 2:] > own[:, :2]).all()


def test_the_default_profiles_squares_hold_what_the_original_shows(metas):
    """A square of the longer side where the face is sure and lies inside, but for what the smoothing changes."""
    own = face_boxes(metas, scale=float(GOLDEN["scale"]))
    assert (own[:, 2] - own[:, 0] == own[:, 3] - own[:, 1]).all()
    assert ((own[:, :2] >= 0) & (own[:, 2:] <= [metas.width, metas.height])).all()
    sizes = BOXES[:, 2:] - BOXES[:, :2]
    sure = (metas.face[:, 1:, 2].mean(axis=1) >= 0.3) & (sizes >= 8).all(axis=1)
    sure &= (sizes.max(axis=1) <= min(metas.width, metas.height)) & (BOXES[:, :2] > 0).all(axis=1)
    assert sure.any()
    np.testing.assert_allclose((own[:, 2] - own[:, 0])[sure], sizes.max(axis=1)[sure], rtol=0.15)
