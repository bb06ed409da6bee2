import numpy as np
import pytest
from small_runs import DEMO, MODELS

from preprocessing.detection import MIN_SCORE
from preprocessing.networks import open_detector
from preprocessing.tracking import GAP_FRAMES, PeopleTracker, PersonPerFrame, fill_gap, smooth_boxes
from preprocessing.video import decode_frames


@pytest.fixture(scope="module")
def crossing() -> list[np.ndarray]:
    """What the detector finds in the video of two people who walk past each other."""
    frames = decode_frames(DEMO / "videos/two_people.mp4").frames_rgb
    return open_detector(MODELS.detector, num_threads=2).people(frames)


def test_two_people_keep_their_numbers(crossing):
    tracker = PeopleTracker(30.0, min_score=MIN_SCORE)
    named = [tracker.update(people) for people in crossing]
    assert {number for frame in named for number in frame} == {0, 1}
    for number in (0, 1):
        centers = np.array([(f[number][0] + f[number][2]) / 2 for f in named if number in f])
        assert len(centers) >= 88
        assert np.abs(np.diff(centers)).max() < 40  # no jump to the other, who is hundreds of pixels away
    # One walks on a wall, above the other: who is who never changes, also where they pass each other.
    assert all(f[0][3] < f[1][1] for f in named if len(f) == 2)


def test_the_original_flips_between_them(crossing):
    chooser = PersonPerFrame((526, 640))
    centers = np.array([chooser.update(people)[0][[0, 2]].mean() for people in crossing])
    assert np.abs(np.diff(centers)).max() > 150


def test_the_first_frame_is_named_too():
    tracker = PeopleTracker(30.0, min_score=MIN_SCORE, first_number=3)
    assert list(tracker.update(np.array([[10, 10, 50, 90, 0.6]]))) == [3]
    assert tracker.next_number == 4


def test_a_frame_without_anyone_is_fine():
    tracker = PeopleTracker(30.0, min_score=MIN_SCORE)
    assert tracker.update(np.zeros((0, 5))) == {}
    assert list(tracker.update(np.array([[10, 10, 50, 90, 0.6]]))) == [0]
    assert tracker.update(np.zeros((0, 5))) == {}


def test_short_gaps_are_filled_along_a_line_and_long_ones_are_not():
    start, end = np.array([0, 0, 10, 10, 1.0]), np.array([30, 0, 40, 10, 0.4])
    boxes = {0: start}
    fill_gap(boxes, 3, end, last=0)
    np.testing.assert_allclose(boxes[1], [10, 0, 20, 10, 0.8])
    np.testing.assert_allclose(boxes[2], [20, 0, 30, 10, 0.6])
    boxes = {0: start}
    fill_gap(boxes, GAP_FRAMES + 2, end, last=0)
    assert sorted(boxes) == [0, GAP_FRAMES + 2]


def test_smoothing_takes_jitter_out_and_keeps_motion():
    generator = np.random.default_rng(1)
    t = np.arange(77)
    path = np.stack([2 * t, 100 + 0.05 * (t - 38) ** 2, 2 * t + 60, 300 + 0.05 * (t - 38) ** 2, np.full(77, 0.5)], 1)
    noisy = path.copy()
    noisy[:, :4] += generator.normal(0, 3, (77, 4))
    smooth = smooth_boxes(noisy)
    assert np.abs(smooth - path)[:, :4].mean() < 0.75 * np.abs(noisy - path)[:, :4].mean()
    assert np.abs(np.diff(smooth[:, 0], 2)).mean() < 0.3 * np.abs(np.diff(noisy[:, 0], 2)).mean()
    np.testing.assert_allclose(smooth_boxes(path), path, atol=1e-9)  # a parabola passes unchanged
    np.testing.assert_array_equal(smooth[:, 4], noisy[:, 4])
