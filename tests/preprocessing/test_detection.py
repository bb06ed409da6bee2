import numpy as np
import pytest
from small_runs import DEMO, MODELS, main_people

from preprocessing.detection import decode_people, select_person
from preprocessing.networks import open_detector
from preprocessing.video import decode_frames

HW = (640, 640)


def rows_of(*boxes):
    rows = np.zeros((300, 6), np.float32)
    rows[: len(boxes)] = np.reshape(boxes, (-1, 6))
    return rows


@pytest.fixture(scope="module")
def detector():
    return open_detector(MODELS.detector, num_threads=2, batch_frames=4)


def test_people_come_best_first_without_duplicates_and_other_classes():
    rows = rows_of(
        [0, 0, 100, 200, 0.3, 0],
        [300, 0, 400, 200, 0.9, 0],
        [2, 0, 102, 200, 0.5, 0],
        [0, 0, 600, 600, 0.9, 7],
    )
    people = decode_people(rows, HW)
    np.testing.assert_allclose(people, [[300, 0, 400, 200, 0.9], [2, 0, 102, 200, 0.5]], atol=1e-6)


def test_boxes_are_scaled_to_the_frame():
    people = decode_people(rows_of([64, 64, 128, 320, 0.9, 0]), (320, 1280))
    np.testing.assert_allclose(people[0], [128, 32, 256, 160, 0.9], atol=1e-6)


def test_a_larger_person_wins_over_a_surer_one():
    people = decode_people(rows_of([0, 0, 100, 200, 0.9, 0], [200, 0, 400, 400, 0.2, 0]), HW)
    np.testing.assert_allclose(select_person(people, HW), [200, 0, 400, 400, 0.2], atol=1e-6)


def test_nobody_is_a_score_below_zero():
    assert select_person(decode_people(rows_of(), HW), (360, 640)).tolist() == [0, 0, 640, 360, -1]


def test_both_people_are_found_in_every_frame(detector):
    frames = decode_frames(DEMO / "videos/two_people.mp4", range(0, 90, 15)).frames_rgb
    assert [len(people) for people in detector.people(frames)] == [2] * len(frames)


def test_batches_change_nothing(detector):
    frames = decode_frames(DEMO / "videos/walker.mp4", range(0, 90, 15)).frames_rgb
    one_by_one = np.concatenate([main_people(detector, frame[None]) for frame in frames])
    np.testing.assert_allclose(main_people(detector, frames), one_by_one, atol=1e-5)


def test_an_empty_scene_has_nobody(detector):
    frames = np.full((2, 90, 160, 3), 127, np.uint8)
    assert (main_people(detector, frames)[:, 4] == -1).all()
    assert [people.shape for people in detector.people(frames)] == [(0, 5), (0, 5)]
