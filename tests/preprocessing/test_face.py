from dataclasses import replace

import numpy as np
import pytest

from preprocessing.face import crop_faces, face_boxes
from preprocessing.types import PROFILES, WAN, PoseMetas

UPSTREAM = PROFILES["upstream"]
STRETCHED = replace(WAN, face_crops="stretched")
HEIGHT, WIDTH = 200, 400


def metas_with_faces(*boxes):
    """One frame a box: landmarks that span x1, y1, x2, y2 in pixels; None: not measured."""
    face = np.zeros((len(boxes), 69, 3), np.float32)
    for points, box in zip(face, boxes):
        if box is None:
            points[:, :2] = np.nan
            continue
        points[:, 0] = np.linspace(box[0], box[2], 69) / WIDTH
        points[:, 1] = np.linspace(box[1], box[3], 69) / HEIGHT
        points[0, :2] = 0, 5  # the heel
        points[1, :2] = box[0] / WIDTH, box[1] / HEIGHT
        points[:, 2] = 0.9
    empty = {part: np.zeros((len(boxes), num, 3)) for part, num in (("body", 20), ("left_hand", 21))}
    return PoseMetas(**empty, right_hand=empty["left_hand"], face=face, width=WIDTH, height=HEIGHT)


def test_a_box_grows_by_the_root_of_the_scale_mostly_upwards():
    metas = metas_with_faces((100.5, 80.5, 140.5, 140.5))
    # width 40 -> 48: 4 each side; height 60 -> 72: 9 above, 3 below
    assert face_boxes(metas, scale=1.44, profile=STRETCHED)[0].tolist() == [96, 71, 144, 143]
    assert face_boxes(metas, scale=1.44)[0].tolist() == [84, 71, 156, 143]  # the square of 72 around it


def test_a_box_ends_at_the_edge_of_the_canvas():
    for profile in (WAN, STRETCHED):
        box = face_boxes(metas_with_faces((-20, -20, 60, 60)), profile=profile)[0]
        assert box[:2].tolist() == [0, 0]
        box = face_boxes(metas_with_faces((350, 150, 450, 250)), profile=profile)[0]
        assert box[2:].tolist() == [WIDTH, HEIGHT]


def test_squares_stay_inside_the_canvas():
    metas = metas_with_faces((390, 20, 399, 90), (10, -300, 90, 400), (1, 190, 30, 199))
    boxes = face_boxes(metas)
    assert ((boxes[:, :2] >= 0) & (boxes[:, 2:] <= [WIDTH, HEIGHT])).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides[:, 0] == sides[:, 1]).all() and sides[1].tolist() == [HEIGHT, HEIGHT]


def test_boxes_follow_a_face_smoothly_but_not_across_a_gap():
    rng = np.random.default_rng(0)
    x = np.concatenate([100 + 2.0 * np.arange(20), 300 + np.zeros(20)])
    jitter = rng.normal(0, 2, (40, 2))
    faces = [(x + dx, 60 + dy, x + dx + 40, 100 + dy) for x, (dx, dy) in zip(x, jitter)]
    faces[20:24] = [None] * 4
    metas = metas_with_faces(*faces)
    smooth, plain = face_boxes(metas), face_boxes(metas, profile=STRETCHED)
    middles = [(boxes[:, 0] + boxes[:, 2]) / 2 for boxes in (smooth, plain)]
    shaking = [np.abs(np.diff(middle[:20], 2)).mean() for middle in middles]
    assert shaking[0] < 0.4 * shaking[1]
    np.testing.assert_allclose(middles[0][[19, 24]], middles[1][[19, 24]], atol=6)  # the face jumps by 160 there
    np.testing.assert_array_equal(smooth[20:24], smooth[[19] * 4])


def test_an_unsure_face_is_not_followed():
    metas = metas_with_faces((100, 80, 140, 140), (200, 80, 260, 140))
    metas.face[1, :, 2] = 0.2
    np.testing.assert_array_equal(*face_boxes(metas))
    assert (np.diff(face_boxes(metas, profile=STRETCHED), axis=0) != 0).any()


def test_frames_without_a_usable_face_take_the_nearest_earlier_box():
    seen, other = (100, 80, 140, 140), (200, 80, 260, 140)
    off_screen, tiny = (500, 20, 560, 80), (100, 80, 103, 83)
    boxes = face_boxes(metas_with_faces(None, seen, off_screen, tiny, other, None))
    first, second = face_boxes(metas_with_faces(seen, other))
    np.testing.assert_array_equal(boxes, [first, first, first, first, second, second])


def test_a_clip_without_any_face_has_no_boxes():
    assert face_boxes(metas_with_faces(None, None)) is None


def test_upstream_raises_for_a_face_without_extent():
    with pytest.raises(ValueError, match="face landmarks of frame 1 have no extent"):
        face_boxes(metas_with_faces((100, 80, 140, 140), (9, 9, 9, 9)), profile=UPSTREAM)


def test_crops_are_stretched_squares():
    frames = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    frames[1, 50:100, 100:300] = 200
    crops = crop_faces(frames, np.array([[0, 0, 10, 10], [100, 50, 300, 100]]))
    assert crops.shape == (2, 512, 512, 3)
    assert crops[0].max() == 0
    assert crops[1].min() == 200


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (0, 0, WIDTH + 1, 10), (-1, 0, 10, 10), (50, 9, 20, 20)])
def test_boxes_without_pixels_are_errors(box):
    with pytest.raises(ValueError, match=r"of frame 0 holds no pixel of the 400x200 picture"):
        crop_faces(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.array([box]))
