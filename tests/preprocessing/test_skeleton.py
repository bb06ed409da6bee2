import numpy as np
import pytest

from preprocessing.skeleton import LIMBS, draw_pose, draw_poses

HW = (400, 300)


def pose_of(points):
    """62 points of which those in `points` {row: (x, y)} are seen."""
    pose = np.full((62, 3), np.nan)
    pose[:, 2] = 0
    for row, xy in points.items():
        pose[row] = *xy, 0.9
    return pose


def test_every_parent_comes_before_its_children():
    reached = {1}
    for parent, child in LIMBS:
        assert parent in reached
        reached.add(child)
    assert reached == set(range(20))


def test_nothing_seen_draws_nothing():
    assert draw_pose(pose_of({}), HW).max() == 0


def test_a_joint_alone_is_a_dot_in_full_colour():
    drawing = draw_pose(pose_of({0: (150.9, 200.9)}), HW)
    assert drawing[200, 150].tolist() == [255, 0, 0]
    assert (drawing > 0).any(axis=2).sum() == 5  # a circle of radius 1


def test_a_limb_joins_two_joints_at_reduced_brightness():
    drawing = draw_pose(pose_of({1: (100, 100), 2: (200, 100)}), HW)
    assert drawing[100, 150].tolist() == [153, 0, 0]  # int(0.6 * 255)


@pytest.mark.parametrize("score", [0.49, 0.0])
def test_points_below_the_threshold_are_left_out(score):
    pose = pose_of({1: (100, 100), 2: (200, 100)})
    pose[2] = 200, 100, score
    assert draw_pose(pose, HW)[100, 150].max() == 0


def test_head_and_hands_can_be_left_out():
    pose = pose_of({0: (50, 50), 14: (40, 40), 20: (100, 100), 41: (200, 200)})
    assert draw_pose(pose, HW, draw_head=False, draw_hands=False).max() == 0
    assert draw_pose(pose, HW, draw_head=False)[100, 100].tolist() == [0, 0, 255]
    assert draw_pose(pose, HW, draw_hands=False)[50, 50].max() > 0


def test_points_far_off_the_canvas_do_no_harm():
    pose = pose_of({1: (-5000, 90), 2: (6000, 120), 20: (-3, 5), 21: (2, 99999)})
    assert draw_pose(pose, HW).shape == (*HW, 3)


def test_a_batch_is_its_frames():
    poses = np.stack([pose_of({0: (10, 10)}), pose_of({3: (90, 90), 2: (20, 99)})])
    np.testing.assert_array_equal(draw_poses(poses, HW)[1], draw_pose(poses[1], HW))
