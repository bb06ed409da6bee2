"""The frames of a video as they are looked at: all of them, in order, with cuts and people; threads end with it."""

import threading
from contextlib import closing

import numpy as np
import pytest
from small_runs import DEMO, MODELS, part_of, settings, write_video

from preprocessing.moments import Moment, look
from preprocessing.networks import open_detector
from preprocessing.types import PROFILES, WAN, FrameBatch
from preprocessing.video import UserVideoError, decode_frames, probe

WALKER = DEMO / "videos/walker.mp4"


def test_every_frame_comes_once_with_the_people_that_the_detector_finds(tmp_path):
    video = part_of("two_people.mp4", tmp_path / "two.mp4", range(11))
    detector = open_detector(MODELS.detector, num_threads=2, batch_frames=2)
    chosen = settings(area=526 * 640)
    moments = [m for some in look(probe(video), np.arange(11), chosen, WAN, detector) for m in some]
    frames = decode_frames(video).frames_rgb
    assert [moment.seconds for moment in moments] == pytest.approx(np.arange(11) / 30)
    assert not any(moment.starts_shot for moment in moments)
    for moment, frame in zip(moments, frames, strict=True):
        assert moment.frame_rgb.shape == (512, 640, 3)
        people = detector.people(moment.frame_rgb[None])[0]
        np.testing.assert_allclose(moment.people, people, atol=1e-5)
        assert len(people) == 2 and abs(moment.frame_rgb.mean() - frame.mean()) < 3


def test_a_batch_comes_back_with_its_people():
    frames = decode_frames(WALKER, range(6)).frames_rgb
    batches = [FrameBatch(frames_rgb=frames[i : i + 3], pts_seconds=np.zeros(3)) for i in (0, 3)]
    detector = open_detector(MODELS.detector, num_threads=2, batch_frames=3)
    (first, people), (second, _) = detector.look(batches)
    assert first is batches[0] and second is batches[1] and len(people) == 3


def test_shots_start_at_cuts_unless_the_profile_ignores_them(tmp_path):
    walker, jumping = (decode_frames(DEMO / f"videos/{n}.mp4", range(12)).frames_rgb for n in ("walker", "jumping"))
    video = write_video(tmp_path / "cut.mp4", np.concatenate([walker[:, :768], jumping[:, :, :480]]))
    for profile, starts in (("wan", [12]), ("upstream", [])):
        moments = [
            m
            for some in look(probe(video), np.arange(24), settings(kind="clips"), PROFILES[profile], None)
            for m in some
        ]
        assert [i for i, moment in enumerate(moments) if moment.starts_shot] == starts
        assert len(moments) == 24 and all(moment.people is None for moment in moments)


def test_closing_ends_the_threads():
    before = threading.active_count()
    with closing(look(probe(WALKER), np.arange(90), settings(kind="clips"), WAN, None)) as moments:
        assert len(next(moments)) > 0
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_frames_before_damage_are_given(tmp_path):
    data = bytearray(WALKER.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200_000] = bytes(200_000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    num_given = []
    for detector in (None, open_detector(MODELS.detector, num_threads=2, batch_frames=8)):
        given: list[Moment] = []
        with pytest.raises(UserVideoError, match="does not decode"):
            for some in look(probe(tmp_path / "damaged.mp4"), np.arange(90), settings(kind="clips"), WAN, detector):
                given += some
        num_given.append(len(given))
    assert 0 < num_given[0] < 90 and num_given[0] == num_given[1]
