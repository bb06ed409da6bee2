import cv2
import numpy as np
import pytest

from preprocessing.quality import (
    blur,
    clip_quality,
    face_size,
    luma_change,
    mask_area_jitter,
    mask_area_mean,
    motion,
    track_switches,
    visible_share,
)

BOX = [10, 10, 30, 50, 0.9]


def keypoints_at(*xy, score=0.9):
    points = np.full((len(xy), 133, 3), score, np.float32)
    points[..., :2] = np.array(xy)[:, None]
    return points


def test_motion_is_in_heights_of_the_box():
    boxes = np.array([BOX] * 3, float)
    assert motion(keypoints_at((10, 10), (14, 13), (14, 13)), boxes) == pytest.approx(0.5 * 5 / 40)
    assert motion(keypoints_at((10, 10), (14, 13), score=0.4), boxes[:2]) == 0


def test_motion_skips_frames_without_a_person():
    boxes = np.array([BOX, [0, 0, 0, 0, -1], BOX], float)
    keypoints = keypoints_at((10, 10), (10, 10), (14, 13))
    keypoints[1, :, :2], keypoints[1, :, 2] = np.nan, 0
    assert motion(keypoints, boxes) == 0


def test_visible_share_counts_points_in_the_picture():
    keypoints = keypoints_at((10, 10), (10, 10), (70, 10), (10, 10))
    keypoints[1, :, 2] = 0.2
    assert visible_share(keypoints, (40, 60)) == 0.5


def test_mask_figures():
    mask = np.zeros((4, 10, 10), bool)
    mask[[0, 2], :5] = True
    mask[[1, 3], :4] = True
    assert mask_area_mean(mask) == pytest.approx(0.45)
    assert mask_area_jitter(mask) == pytest.approx(0.1 / 0.45)
    assert mask_area_jitter(mask[:1]) == 0
    assert mask_area_jitter(np.zeros((3, 4, 4), bool)) == 0


def test_face_size_is_the_shorter_side():
    assert face_size(np.array([[0, 0, 10, 20], [0, 0, 30, 12], [0, 0, 100, 100]])) == 12


def test_blur_falls_when_the_person_is_blurred():
    sharp = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    soft = sharp.copy()
    for frame in soft:
        frame[10:50, 10:50] = cv2.GaussianBlur(frame, (9, 9), 3)[10:50, 10:50]
    boxes = np.array([[14, 14, 46, 46, 0.9]] * 2)
    assert blur(soft, boxes) < 0.1 * blur(sharp, boxes)
    nobody = np.array([[0, 0, 64, 64, -1.0]] * 2)
    assert blur(soft, nobody) > blur(soft, boxes)


def test_track_switches_count_jumps():
    a, b, nobody = [0, 0, 10, 10, 0.9], [50, 0, 60, 10, 0.9], [0, 0, 64, 64, -1]
    assert track_switches(np.array([a, a, nobody, a], float)) == 0
    assert track_switches(np.array([a, b, nobody, a, b], float)) == 3
    assert track_switches(np.array([nobody, a], float)) == 0


def test_all_figures_of_a_clip():
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    figures = clip_quality(
        frames,
        boxes_xyxys=np.array([BOX] * 2, float),
        keypoints=keypoints_at((10, 10), (10, 10)),
        face_boxes_xyxy=None,
        mask=np.ones((2, 40, 60), bool),
    )
    assert figures["face_size"] is None
    assert figures == {
        "mean_keypoint_score": pytest.approx(0.9),
        "visible_share": 1,
        "hand_score": pytest.approx(0.9),
        "face_size": None,
        "mask_area_mean": 1,
        "mask_area_jitter": 0,
        "motion": 0,
        "luma_change": 0,
        "blur": 0,
        "track_switches": 0,
    }


def test_luma_change_tells_a_still_from_a_moving_picture():
    still = np.full((4, 40, 60, 3), 90, np.uint8)
    assert luma_change(still) == 0
    brighter = np.stack([frame + 5 * i for i, frame in enumerate(still)]).astype(np.uint8)
    assert luma_change(brighter) == pytest.approx(5, abs=0.01)
    assert luma_change(still[:1]) == 0
