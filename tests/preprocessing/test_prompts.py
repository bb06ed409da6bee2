import numpy as np
import pytest

from preprocessing.pose import metas_from_keypoints
from preprocessing.prompts import frame_prompts, key_frames, point_prompts
from preprocessing.types import PROFILES, Person, PoseMetas

UPSTREAM = PROFILES["upstream"]
HW = (100, 60)
# Nose, shoulders, hips and ankles of COCO, from which the 8 points to click on are made (the neck between shoulders).
CLICKED = {0: (30, 20), 5: (36, 30), 6: (24, 30), 11: (34, 55), 12: (26, 55), 15: (34, 85), 16: (26, 85)}


def standing(num_frames=8, *, score=0.9) -> np.ndarray:
    """Key points (T, 133, 3) of a person in the middle of the picture."""
    keypoints = np.zeros((num_frames, 133, 3), np.float32)
    keypoints[..., :2] = 30, 50
    for row, xy in CLICKED.items():
        keypoints[:, row, :2] = xy
    keypoints[..., 2] = score
    return keypoints


def boxes(box=(20, 15, 40, 90), num_frames=8, score=0.8) -> np.ndarray:
    return np.tile(np.array([*box, score], float), (num_frames, 1))


def prompts_of(keypoints, *, others=(), box=(20, 15, 40, 90), **options):
    person = Person(boxes_xyxys=boxes(box, len(keypoints)), keypoints=keypoints)
    others = [Person(boxes_xyxys=boxes(other, len(keypoints)), keypoints=None) for other in others]
    return frame_prompts(person, others, HW, **options)


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
    metas = PoseMetas(body=body, left_hand=hand, right_hand=hand, face=np.zeros((1, 69, 3)), width=60, height=40)
    assert point_prompts(metas, [0])[0].tolist() == [[30, 20]] * 6
    assert len(point_prompts(metas, [0], profile=UPSTREAM)[0]) == 8


def test_lost_people_give_no_prompt():
    keypoints = np.full((1, 133, 3), np.nan, np.float32)
    keypoints[..., 2] = 0
    assert point_prompts(metas_from_keypoints(keypoints, (40, 60)), [0])[0].shape == (0, 2)


def test_every_quarter_gives_its_most_telling_frame_and_the_box():
    keypoints = standing(8, score=0.3)
    for frame in (1, 2, 5, 7):
        keypoints[frame, :, 2] = 0.9
    prompts = prompts_of(keypoints)
    assert [prompt.frame for prompt in prompts] == [1, 2, 5, 7]
    for prompt in prompts:
        assert prompt.points_xy.shape == (8, 2)
        assert prompt.on_person.all()
        np.testing.assert_array_equal(prompt.box_xyxy, [20, 15, 40, 90])


def test_unsure_points_leave_the_box_to_tell_where_the_person_is():
    (prompt, *_) = prompts_of(standing(4, score=0.2))
    assert len(prompt.points_xy) == 0
    np.testing.assert_array_equal(prompt.box_xyxy, [20, 15, 40, 90])


def test_the_box_ends_with_the_picture():
    (prompt,) = prompts_of(standing(1), box=(-30, 15, 200, 90))
    np.testing.assert_array_equal(prompt.box_xyxy, [0, 15, 60, 90])


def test_other_people_are_pointed_at_as_not_meant_where_they_are_outside_the_box():
    (prompt,) = prompts_of(standing(1), others=[(42, 10, 58, 90), (22, 20, 38, 80), (70, 0, 90, 90)])
    away = prompt.points_xy[~prompt.on_person]
    np.testing.assert_array_equal(away, [[50, 30], [50, 50]])  # of the first; the second hides behind, the third is out
    assert prompt.on_person.sum() == 8


def test_frames_without_the_person_are_not_prompted():
    person = Person(boxes_xyxys=boxes(), keypoints=standing())
    person.boxes_xyxys[:6, 4] = -1
    assert {prompt.frame for prompt in frame_prompts(person, [], HW)} == {6, 7}


def test_upstream_clicks_in_evenly_spaced_frames_wherever_the_points_are():
    keypoints = standing(8, score=0.1)
    keypoints[:, 0, 0] = 480  # eight pictures away
    prompts = prompts_of(keypoints, others=[(42, 10, 58, 90)], profile=UPSTREAM)
    assert [prompt.frame for prompt in prompts] == key_frames(8)
    for prompt in prompts:
        assert prompt.on_person.all() and len(prompt.points_xy) == 8
        assert prompt.box_xyxy is None
        assert prompt.points_xy[0].tolist() == [480, 20]


def test_key_points_are_needed():
    with pytest.raises(ValueError, match="prompts need the person's key points"):
        frame_prompts(Person(boxes_xyxys=boxes(), keypoints=None), [], HW)
