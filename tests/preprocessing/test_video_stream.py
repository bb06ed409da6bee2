"""Frames as they stream: which ones, in what memory, and what is left when the reader stops."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from synthetic_videos import number_shown, write_video

from preprocessing.container import read_contents
from preprocessing.video import UserVideoError, decode_frames, stream_frames

VIDEOS = Path(__file__).parents[2] / "demo/videos"
ROOT = Path(__file__).parents[2]


def streamed(path, indices, chunk_frames=32):
    batches = list(stream_frames(path, indices, chunk_frames=chunk_frames))
    return np.concatenate([batch.frames_rgb for batch in batches])


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """400 frames, a key frame every 50, B frames before each (open GOPs)."""
    options = {"g": "50", "keyint_min": "50", "flags": "-cgop", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
    return write_video(tmp_path_factory.mktemp("videos") / "long.mp4", range(400), options=options)


@pytest.mark.parametrize("chunk_frames", [1, 7, 32, 1000])
def test_chunks_join_to_the_whole(chunk_frames):
    batches = list(stream_frames(VIDEOS / "two_people.mp4", range(90), chunk_frames=chunk_frames))
    assert [len(batch) for batch in batches[:-1]] == [chunk_frames] * (90 // chunk_frames - (90 % chunk_frames == 0))
    whole = decode_frames(VIDEOS / "two_people.mp4")
    np.testing.assert_array_equal(np.concatenate([batch.frames_rgb for batch in batches]), whole.frames_rgb)
    np.testing.assert_array_equal(np.concatenate([batch.pts_seconds for batch in batches]), whole.pts_seconds)


def test_frames_left_out_and_repeated():
    indices = [3, 3, 3, 4, 20, 21, 21, 88]
    whole = decode_frames(VIDEOS / "jumping.mp4").frames_rgb
    np.testing.assert_array_equal(streamed(VIDEOS / "jumping.mp4", indices, 3), whole[indices])


def test_the_vp9_file_that_defeats_decords_threads():
    assert streamed(VIDEOS / "original_vp9_head.mp4", range(0, 30, 3)).shape == (10, 994, 1768, 3)


@pytest.mark.parametrize(
    "indices",
    [
        range(400),
        range(0, 400, 40),
        [0, 1, 390, 391, 399],
        [260, 260, 261, 399],
        [49, 50, 51, 147, 148, 149, 296, 297],  # B frames that lie behind the key frame they precede
    ],
)
def test_seeking_finds_the_frames_that_reading_through_gives(long_video, indices):
    indices = np.asarray(indices)
    assert len(read_contents(long_video).key_indices) == 8
    frames = streamed(long_video, indices)
    assert [number_shown(frame) for frame in frames] == [index % 256 for index in indices]
    np.testing.assert_array_equal(frames, decode_frames(long_video).frames_rgb[indices])


def test_a_jump_does_not_decode_what_it_skips(long_video):
    """Timed against reading through: a clip late in a film must not cost the film."""
    seconds = []
    for indices in (range(399, 400), range(400)):
        started = time.process_time()
        streamed(long_video, indices)
        seconds.append(time.process_time() - started)
    assert seconds[0] < 0.5 * seconds[1]


@pytest.mark.parametrize("video", ["walker.mp4", "original_vp9_head.mp4"])
def test_frames_are_those_that_decord_gives_the_original(video):
    import decord

    reader = decord.VideoReader(str(VIDEOS / video), num_threads=1)
    for index, frame in enumerate(streamed(VIDEOS / video, range(len(reader)))):
        np.testing.assert_array_equal(frame, reader.next().asnumpy(), err_msg=f"frame {index}")


def test_nothing_asked_for_is_nothing_given():
    assert list(stream_frames(VIDEOS / "jumping.mp4", [])) == []


def test_what_cannot_be_streamed_is_said_at_once():
    with pytest.raises(ValueError, match=r"walker\.mp4: frames asked for out of order; sort them"):
        stream_frames(VIDEOS / "walker.mp4", [3, 2])
    with pytest.raises(UserVideoError, match=r"frame 90 was asked for, it has frames 0\.\.89"):
        stream_frames(VIDEOS / "walker.mp4", [0, 90])
    with pytest.raises(ValueError, match="chunk_frames=0: give at least 1"):
        stream_frames(VIDEOS / "walker.mp4", [0], chunk_frames=0)


def open_files():
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if link.exists()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads and files through /proc")
@pytest.mark.parametrize("indices", [range(400), [0, 300, 399]])
def test_stopping_early_closes_file_and_threads(long_video, indices):
    next(iter(stream_frames(long_video, indices, chunk_frames=1)))
    gc.collect()
    threads = len(os.listdir("/proc/self/task"))
    for _ in range(10):
        stream = iter(stream_frames(long_video, indices, chunk_frames=2))
        next(stream)
        assert str(long_video) in open_files()
        stream.close()
        assert str(long_video) not in open_files()
    assert len(os.listdir("/proc/self/task")) == threads
    assert threading.active_count() <= threads


PEAK = """
import resource, sys, time
import numpy as np
from preprocessing.video import probe, stream_frames
count = 0
for batch in stream_frames(sys.argv[1], np.arange(probe(sys.argv[1]).num_frames)):
    count += len(batch)
    time.sleep(0.05)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kilobytes(path, num_frames):
    command = [sys.executable, "-c", PEAK, str(path)]
    count, peak = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert int(count) == num_frames
    return int(peak)


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Ten times the frames, and a caller that takes its time: at most 1.15 times the memory."""
    peaks = []
    for num_loops in (1, 10):
        path = tmp_path / "loops.mp4"
        loop_video(VIDEOS / "walker.mp4", path, num_loops)
        peaks.append(peak_kilobytes(path, 90 * num_loops))
    assert peaks[1] <= 1.15 * peaks[0]


def loop_video(source, target, num_loops):
    """Copy the packets of `source` several times over."""
    with av.open(str(target), "w") as writer:
        with av.open(str(source)) as reader:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            period = reader.streams.video[0].duration
        for loop in range(num_loops):
            with av.open(str(source)) as reader:
                for packet in reader.demux(video=0):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + loop * period, packet.dts + loop * period
                        packet.stream = stream
                        writer.mux(packet)
