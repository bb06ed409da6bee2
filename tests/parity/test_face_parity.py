import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, picture

from preprocessing.face import crop_faces, face_boxes

GOLDEN = arrays("07_face")


def test_face_boxes_match_the_original(metas):
    boxes = face_boxes(metas, scale=float(GOLDEN["scale"]), profile=UPSTREAM)
    np.testing.assert_array_equal(boxes[:, [0, 2, 1, 3]], GOLDEN["face_bbox_x1x2y1y2"])


def test_face_crop_matches_the_original():
    box = GOLDEN["face_bbox_x1x2y1y2"][:1, [0, 2, 1, 3]]
    crop = crop_faces(picture("01_frame_rgb.png")[None], box)[0]
    np.testing.assert_array_equal(crop[::8, ::8], GOLDEN["face512_f0_stride8"])


def test_frames_that_crash_the_original_are_errors_or_take_another_box(metas):
    boxes = GOLDEN["face_bbox_x1x2y1y2"][:, [0, 2, 1, 3]]
    broken = np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(axis=1))
    assert len(broken)
    with pytest.raises(ValueError, match="holds no pixel"):
        crop_faces(picture("01_frame_rgb.png")[None], boxes[broken[:1]])
    own = face_boxes(metas, scale=float(GOLDEN["scale"]))
    assert (own[:, 2:] > own[:, :2]).all()
    np.testing.assert_array_equal(np.delete(own, broken, axis=0)[:3], np.delete(boxes, broken, axis=0)[:3])
