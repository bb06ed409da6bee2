import numpy as np
import pytest
from small_runs import DEMO, pipeline, process, write_video

from preprocessing.canvas import cover_resize
from preprocessing.scenes import ShotDetector
from preprocessing.video import decode_frames


def frames_of(name, num, hw=(160, 160)):
    frames = decode_frames(DEMO / "videos" / name, range(num)).frames_rgb
    return np.stack([cover_resize(frame, height=hw[0], width=hw[1]) for frame in frames])


@pytest.fixture(scope="module")
def three_shots():
    return np.concatenate([frames_of("walker.mp4", 31), frames_of("jumping.mp4", 22), frames_of("two_people.mp4", 40)])


@pytest.mark.parametrize("chunk", [1, 16, 93])
def test_cuts_are_found_however_frames_arrive(three_shots, chunk):
    detector = ShotDetector(30.0)
    for start in range(0, len(three_shots), chunk):
        detector.push(three_shots[start : start + chunk])
        assert all(cut < detector.num_settled for cut in detector.cuts)
    assert detector.cuts == {31, 53}


@pytest.mark.parametrize("name", ["walker.mp4", "jumping.mp4", "two_people.mp4"])
def test_a_moving_camera_is_no_cut(name):
    detector = ShotDetector(30.0)
    detector.push(frames_of(name, 90))
    assert detector.cuts == set()


def test_no_clip_reaches_across_a_cut(three_shots, tmp_path):
    video = write_video(tmp_path / "cuts.mp4", three_shots)
    rows = process(pipeline(kind="clips", num_frames=13, fps=30.0), video)
    starts = [round(row["source"]["start_seconds"] * 30) for row in rows]
    assert starts == [0, 13, 31, 53, 66, 79]


def test_people_of_another_shot_are_other_people(three_shots, tmp_path):
    video = write_video(tmp_path / "cuts.mp4", three_shots)
    rows = process(pipeline(num_frames=13, fps=30.0), video)
    assert len({row["source"]["track"] for row in rows}) >= 3
    for row in rows:
        start = round(row["source"]["start_seconds"] * 30)
        shot = next(s for s in (range(31), range(31, 53), range(53, 93)) if start in s)
        assert start + 12 in shot
        assert round(row["reference_source"]["seconds"] * 30) in shot
