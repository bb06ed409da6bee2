import numpy as np
import pytest
from small_runs import DEMO, MODELS, main_people

from preprocessing.heatmaps import decode_heatmaps
from preprocessing.networks import open_detector, open_pose
from preprocessing.pose import (
    crops_of_boxes,
    hide_low_scores,
    metas_from_keypoints,
    pose62,
    pose_input,
)
from preprocessing.types import PROFILES
from preprocessing.video import decode_frames

UPSTREAM = PROFILES["upstream"]


@pytest.fixture(scope="module")
def walker():
    frames = decode_frames(DEMO / "videos/walker.mp4", [0, 30, 60]).frames_rgb
    return frames, main_people(open_detector(MODELS.detector), frames)


@pytest.fixture(scope="module")
def network():
    return open_pose(MODELS.pose, num_threads=2, batch_frames=2)


def test_gaussians_are_located_to_a_hundredth_of_a_cell():
    rng = np.random.default_rng(0)
    peaks = rng.uniform([8, 8], [39, 55], (2, 7, 2))
    y, x = np.mgrid[:64, :48]
    distance = (x - peaks[..., None, None, 0]) ** 2 + (y - peaks[..., None, None, 1]) ** 2
    maps = (0.7 * np.exp(-distance / 8)).astype(np.float32)
    center, size = np.array([[100.0, 50], [7, 9]]), np.array([[96.0, 128], [48, 64]])
    points = decode_heatmaps(maps, center_xy=center, size_wh=size)
    expected = peaks * (size / (48, 64))[:, None] + (center - size / 2)[:, None]
    np.testing.assert_allclose(points[..., :2], expected, atol=0.02)
    assert (points[..., 2] <= 0.7).all()


def test_a_crop_is_the_box_with_a_margin_in_the_shape_of_the_network():
    crops = crops_of_boxes(np.array([[100, 100, 160, 300, 0.9]]), (1000, 1000))
    np.testing.assert_allclose(crops.center_xy, [[130, 200]])
    np.testing.assert_allclose(crops.size_wh, [[200 * 1.25 * 192 / 256, 200 * 1.25]])


def test_a_crop_outside_the_frame_is_black():
    frame = np.full((1, 100, 100, 3), 255, np.uint8)
    batch = pose_input(frame, crops_of_boxes(np.array([[500, 500, 600, 700, 0.9]]), (100, 100)))
    black = -np.array([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225])
    np.testing.assert_allclose(batch[0, :, 0, 0], black, rtol=1e-5)
    assert np.ptp(batch, axis=(2, 3)).max() == 0


def test_channel_order_is_a_choice_of_the_profile():
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    frame[..., 0] = 255  # red
    crops = crops_of_boxes(np.array([[0, 0, 64, 64, 1.0]]), (64, 64))
    assert pose_input(frame, crops)[0, 0, 128, 96] > 2
    assert pose_input(frame, crops, profile=UPSTREAM)[0, 2, 128, 96] > 2


def test_frames_without_a_person_are_absent(walker, network):
    frames, boxes = walker
    boxes = boxes.copy()
    boxes[1, 4] = -1
    keypoints = network(frames, boxes).keypoints
    assert np.isnan(keypoints[1, :, :2]).all()
    assert (keypoints[1, :, 2] == 0).all()
    np.testing.assert_allclose(keypoints[[0, 2]], network(frames[[0, 2]], boxes[[0, 2]]).keypoints, atol=1e-3)
    pose = pose62(keypoints, frames.shape[1:3])
    assert np.isnan(pose[1, :, :2]).all() and (pose[1, :, 2] == 0).all()
    assert np.isfinite(pose[0, :13]).all()


def test_upstream_measures_the_whole_frame_without_a_person(walker):
    frames, boxes = walker
    network = open_pose(MODELS.pose, profile=UPSTREAM)
    nobody, whole_frame = boxes[:1].copy(), boxes[:1].copy()
    nobody[0, 4] = -1
    whole_frame[0] = 0, 0, frames.shape[2], frames.shape[1], 0.5
    measured = [network(frames[:1], boxes).keypoints for boxes in (nobody, whole_frame)]
    np.testing.assert_array_equal(*measured)


def test_a_folder_means_the_network_in_it(tmp_path, walker, network):
    (tmp_path / "end2end.onnx").symlink_to(MODELS.pose)
    frames, boxes = walker
    expected = network(frames[:1], boxes[:1]).keypoints
    np.testing.assert_allclose(open_pose(tmp_path)(frames[:1], boxes[:1]).keypoints, expected, atol=1e-3)


def test_boxes_must_match_frames(walker, network):
    with pytest.raises(ValueError, match=r"boxes of shape \(2, 5\) for 3 frames"):
        network(walker[0], walker[1][:2])


def test_the_neck_is_between_the_shoulders_and_as_sure_as_their_mean():
    keypoints = np.ones((1, 133, 3), np.float32)
    keypoints[0, 5], keypoints[0, 6] = (40, 20, 0.8), (20, 30, 0.6)
    metas = metas_from_keypoints(keypoints, (100, 200))
    np.testing.assert_allclose(metas.body[0, 1], [30 / 200, 25 / 100, 0.7], rtol=1e-6)


def test_a_lost_body_is_absent_or_the_one_before():
    keypoints = np.full((2, 133, 3), 50, np.float32)
    keypoints[..., 2] = 0.9
    keypoints[1, :, 0] = -20
    assert (metas_from_keypoints(keypoints, (100, 100)).body[1, :, 2] == 0).all()
    metas = metas_from_keypoints(keypoints, (100, 100), profile=UPSTREAM)
    np.testing.assert_array_equal(metas.body[1], metas.body[0])
    with pytest.raises(ValueError, match="the first frame shows no body"):
        metas_from_keypoints(keypoints[::-1], (100, 100), profile=UPSTREAM)


def test_low_scores_hide_points_and_stay():
    points = np.array([[[1, 2, 0.5], [3, 4, 0.49]]])
    np.testing.assert_array_equal(hide_low_scores(points), [[[1, 2, 0.5], [np.nan, np.nan, 0.49]]])
