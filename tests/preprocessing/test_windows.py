import numpy as np
import pytest

from preprocessing.windows import Window, WindowPlanner


def track(*stretches, size=10.0):
    """A box of `size` in every frame of the stretches (first, last)."""
    return {f: np.array([0, 0, size, size, 0.9]) for first, last in stretches for f in range(first, last + 1)}


def planned(tracks, num_frames_seen, *, chunk=None, **options):
    """All windows, given the frames at once or in chunks as they would stream by."""
    planner = WindowPlanner(**{"num_frames": 5, "stride": 5, "people": "largest", **options})
    windows = []
    for settled in range(chunk or num_frames_seen, num_frames_seen + 1, chunk or 1):
        seen = {n: {f: b for f, b in boxes.items() if f < settled} for n, boxes in tracks.items()}
        windows += planner.advance({n: boxes for n, boxes in seen.items() if boxes}, settled)
    windows += planner.advance(tracks, num_frames_seen)
    return [(w.start, w.track) for w in windows]


def test_windows_follow_each_other_while_the_person_is_there():
    assert planned({0: track((0, 17))}, 18) == [(0, 0), (5, 0), (10, 0)]
    assert planned({0: track((0, 17))}, 18, stride=8) == [(0, 0), (8, 0)]
    assert planned({0: track((0, 8))}, 9, stride=2) == [(0, 0), (2, 0), (4, 0)]


def test_a_window_starts_anew_after_a_missing_frame():
    assert planned({0: track((0, 2), (4, 12))}, 13) == [(4, 0)]
    assert planned({0: track((3, 7))}, 13) == [(3, 0)]


def test_largest_takes_the_larger_of_those_who_stay():
    tracks = {0: track((0, 9), size=10), 1: track((0, 4), size=30), 2: track((5, 7), size=90)}
    assert planned(tracks, 10) == [(0, 1), (5, 0)]


def test_all_gives_each_person_windows_of_its_own():
    tracks = {0: track((0, 9)), 1: track((2, 8))}
    assert planned(tracks, 10, people="all") == [(0, 0), (2, 1), (5, 0)]


def test_without_people_windows_tile_the_shot():
    assert planned({}, 12, people="none", first_frame=1) == [(1, -1), (6, -1)]


@pytest.mark.parametrize("people", ["largest", "all"])
def test_the_plan_does_not_depend_on_how_frames_arrive(people):
    generator = np.random.default_rng(0)
    for _ in range(30):
        tracks = {
            n: {f: np.array([0, 0, n + 1, 9, 0.5]) for f in range(60) if generator.random() > 0.08} for n in range(3)
        }
        whole = planned(tracks, 60, people=people)
        for chunk in (1, 7):
            assert sorted(planned(tracks, 60, chunk=chunk, people=people)) == sorted(whole)


def test_frames_that_a_window_may_still_need_are_named():
    planner = WindowPlanner(num_frames=5, stride=5, people="all")
    tracks = {0: track((0, 7)), 1: track((6, 7))}
    assert planner.advance(tracks, 8) == [Window(start=0, track=0)]
    assert planner.first_needed(tracks, 8) == 5
