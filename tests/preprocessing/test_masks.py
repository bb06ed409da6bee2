from pathlib import Path

import numpy as np
import pytest

from preprocessing.detection import PersonDetector
from preprocessing.masks import OnnxPersonSegmenter, blacken, block_augment, dilate, key_frames, point_prompts
from preprocessing.pose import WholeBodyPose, metas_from_keypoints, pose62
from preprocessing.types import PROFILES, PoseMetas
from preprocessing.video import decode_frames
from wan_accel.data.skeleton import BODY

DEMO = Path(__file__).parents[2] / "demo"


def mask_of(*boxes, hw=(40, 60)):
    mask = np.zeros(hw, bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def test_dilation_grows_by_half_the_kernel_a_time():
    mask = mask_of((20, 20, 21, 21))
    np.testing.assert_array_equal(
        dilate(mask[None], kernel_pixels=3, iterations=4)[0], mask_of((16, 16, 25, 25))
    )
    np.testing.assert_array_equal(dilate(mask[None], kernel_pixels=7, iterations=0)[0], mask)


def test_one_block_is_the_bounding_box():
    mask = mask_of((10, 5, 11, 30), (30, 29, 41, 30))
    result = block_augment(mask, num_columns=1, num_rows=1)
    np.testing.assert_array_equal(result, mask_of((10, 5, 40, 29)) | mask)


def test_only_cells_with_a_person_are_filled():
    mask = mask_of((0, 0, 1, 1), (20, 20, 21, 21))
    result = block_augment(mask, num_columns=2, num_rows=2)
    np.testing.assert_array_equal(result, mask_of((0, 0, 10, 10)) | mask)


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 6, 6), (5, 5, 7, 30), (0, 0, 60, 1)])
def test_empty_and_narrow_masks_survive_augmentation(box):
    mask = mask_of(box)
    result = block_augment(mask, num_columns=10, num_rows=20)
    assert (result >= mask).all()
    assert result.any() == mask.any()
    extent = [np.ptp(np.flatnonzero(m.any(axis=0))) if m.any() else 0 for m in (mask, result)]
    assert extent[0] == extent[1]


def test_augmentation_leaves_its_input_alone():
    mask = mask_of((10, 5, 11, 30), (30, 29, 41, 30))
    before = mask.copy()
    block_augment(mask, num_columns=1, num_rows=1)
    np.testing.assert_array_equal(mask, before)


def test_background_is_black_where_the_person_was():
    frames = np.full((1, 40, 60, 3), 7, np.uint8)
    result = blacken(frames, mask_of((10, 10, 20, 20))[None])
    assert result.dtype == np.uint8
    assert result[0, 10:20, 10:20].max() == 0
    assert result.sum() == 7 * 3 * (40 * 60 - 100)


def test_key_frames_start_at_zero_and_are_few():
    for num_frames in range(1, 401):
        frames = key_frames(num_frames)
        assert frames[0] == 0
        assert len(frames) <= 7
        assert frames[-1] < num_frames


def test_prompts_leave_out_what_is_not_seen():
    body = np.full((1, 20, 3), 0.5, np.float32)
    body[0, :, 2] = 0.9
    body[0, 1, 2] = 0.3  # neck unsure
    body[0, 2, 0] = 1.2  # right shoulder off the picture
    hand = np.zeros((1, 21, 3), np.float32)
    metas = PoseMetas(
        body=body, left_hand=hand, right_hand=hand, face=np.zeros((1, 69, 3)), width=60, height=40
    )
    assert point_prompts(metas, [0])[0].tolist() == [[30, 20]] * 6
    assert len(point_prompts(metas, [0], profile=PROFILES["upstream"])[0]) == 8


@pytest.mark.parametrize(("video", "covered"), [("walker.mp4", 0.85), ("jumping.mp4", 0.65)])
def test_the_segmenter_covers_the_person(video, covered):
    frames = decode_frames(DEMO / "videos" / video, range(0, 90, 30)).frames_rgb
    boxes = PersonDetector(DEMO / "models/person_detector.onnx")(frames)
    keypoints = WholeBodyPose(DEMO / "models/wholebody133.onnx")(frames, boxes)
    masks = OnnxPersonSegmenter(DEMO / "models/person_segmenter.onnx")(frames, boxes)
    assert masks.shape == frames.shape[:3]
    pose = pose62(keypoints, frames.shape[1:3])[:, BODY]
    hits = [
        mask[int(y), int(x)]
        for mask, points in zip(masks, pose)
        for x, y, _ in points[np.isfinite(points[:, 0])]
        if 0 <= x < mask.shape[1] and 0 <= y < mask.shape[0]
    ]
    assert np.mean(hits) >= covered
    for mask, (x1, y1, x2, y2, _) in zip(masks, boxes.astype(int)):
        assert mask[y1:y2, x1:x2].sum() > 0.85 * mask.sum()
        assert 0.2 < mask[y1:y2, x1:x2].mean() < 0.9


def test_the_segmenter_leaves_frames_without_a_person_empty():
    segmenter = OnnxPersonSegmenter(DEMO / "models/person_segmenter.onnx")
    frames = decode_frames(DEMO / "videos/walker.mp4", [0, 1]).frames_rgb
    boxes = np.array([[0, 0, 480, 832, -1], [73, 180, 386, 748, 0.7]])
    masks = segmenter(frames, boxes)
    assert not masks[0].any()
    assert masks[1].any()


def test_lost_people_give_no_prompt():
    keypoints = np.full((1, 133, 3), np.nan, np.float32)
    keypoints[..., 2] = 0
    assert point_prompts(metas_from_keypoints(keypoints, (40, 60)), [0])[0].shape == (0, 2)
