import numpy as np

from preprocessing.tracking import follow_largest, iou, track_numbers


def person(x: float, width: float = 20, score: float = 0.5) -> list[float]:
    return [x, 10, x + width, 60, score]


def test_the_largest_person_is_followed_even_when_another_scores_higher():
    people = [np.array([person(10 + t, 20, 0.3), person(80 - t, 10, 0.9)]) for t in range(30)]
    boxes = follow_largest(people, (100, 100))
    np.testing.assert_array_equal(boxes[:, 0], np.arange(30) + 10)


def test_a_frame_without_the_person_is_marked_and_the_person_found_again():
    people = [np.array([person(10)])] * 3 + [np.zeros((0, 5)), np.array([person(70)])] + [np.array([person(12)])]
    boxes = follow_largest(people, (100, 100))
    np.testing.assert_array_equal(boxes[:, 4] >= 0, [True, True, True, False, False, True])
    np.testing.assert_array_equal(track_numbers(boxes), np.zeros(6))


def test_after_a_long_absence_somebody_else_is_followed_under_another_number():
    people = [np.array([person(10)])] * 2 + [np.array([person(70)])] * 20
    boxes = follow_largest(people, (100, 100))
    assert (boxes[2:17, 4] < 0).all() and (boxes[17:, 0] == 70).all()
    np.testing.assert_array_equal(track_numbers(boxes), [0] * 17 + [1] * 5)


def test_overlap_of_boxes():
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30.0]])
    np.testing.assert_allclose(iou(np.array([0, 0, 10, 10.0]), others), [1, 1 / 3, 0])
