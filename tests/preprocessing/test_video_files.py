"""Kinds of files that a real collection holds; PyAV is the oracle of what they show and when."""

import struct

import av
import decord
import numpy as np
import pytest
from synthetic_videos import (
    EDGE_PIXELS,
    number_shown,
    numbered_frame,
    oracle,
    with_display_matrix,
    write_tone,
    write_video,
)

from preprocessing.video import UserVideoError, decode_frames, probe, sample_indices_by_time, stream_frames

UNEVEN_MS = np.array([0, 20, 45, 300, 320, 700, 710, 760, 1300, 1310, 1320, 1900, 1940, 2500, 2533])
B_FRAMES = {"g": "12", "bf": "2"}


def decord_frames(path):
    """What Wan2.2's own preprocessing reads, where decord reads it right."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def numbers_of(frames):
    return [number_shown(frame) for frame in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("offset_ms", [0, 1500])
def test_times_of_a_variable_rate_are_those_of_the_file(tmp_path, suffix, offset_ms):
    path = write_video(tmp_path / f"vfr.{suffix}", range(15), pts_ms=UNEVEN_MS + offset_ms)
    expected = oracle(path)[1]
    info = probe(path)
    np.testing.assert_allclose(info.pts_seconds, expected - expected[0], atol=1e-9)
    np.testing.assert_allclose(info.pts_seconds, UNEVEN_MS / 1000, atol=1e-6)


def test_sampling_takes_what_a_player_shows(tmp_path):
    path = write_video(tmp_path / "vfr.mp4", range(15), pts_ms=UNEVEN_MS)
    indices = sample_indices_by_time(probe(path).pts_seconds, target_fps=10)
    instants = np.arange(len(indices)) / 10
    nearest = np.abs(oracle(path)[1][None] - instants[:, None]).min(axis=1)
    (batch,) = stream_frames(path, indices)
    assert numbers_of(batch.frames_rgb) == indices.tolist()
    np.testing.assert_allclose(np.abs(batch.pts_seconds - instants), nearest, atol=1e-6)
    assert len(indices) == 26  # every tenth of a second up to the last frame at 2.533


@pytest.mark.parametrize(
    ("turn", "matrix", "num_quarters"),
    [("90", (0, 1, -1, 0), 3), ("180", (-1, 0, 0, -1), 2), ("270", (0, -1, 1, 0), 1)],
)
def test_a_turned_video_is_upright(tmp_path, turn, matrix, num_quarters):
    stored = write_video(tmp_path / "stored.mp4", range(5), height=240)
    path = with_display_matrix(stored, tmp_path / f"{turn}.mp4", *matrix)
    expected = np.rot90(oracle(stored)[0], num_quarters, axes=(1, 2))
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]
    np.testing.assert_array_equal(decode_frames(path).frames_rgb, expected)
    np.testing.assert_array_equal(decord_frames(path), expected)


def test_a_mirrored_video_is_mirrored_back(tmp_path):
    stored = write_video(tmp_path / "stored.mp4", range(5))
    path = with_display_matrix(stored, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    np.testing.assert_array_equal(decode_frames(path).frames_rgb, oracle(stored)[0][:, :, ::-1])


def test_a_rotate_tag_of_old_matroska_files_counts(tmp_path):
    path = write_video(tmp_path / "tagged.mkv", range(5), height=240, metadata={"rotate": "90"})
    assert (probe(path).height, probe(path).width) == (208, 240)
    frames = decode_frames(path).frames_rgb
    np.testing.assert_array_equal(frames, np.rot90(oracle(path)[0], 3, axes=(1, 2)))


def test_a_skewed_video_is_refused(tmp_path):
    stored = write_video(tmp_path / "stored.mp4", range(2))
    path = with_display_matrix(stored, tmp_path / "skewed.mp4", 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(UserVideoError, match=r"skewed\.mp4: .*other than quarter turns; re-encode it"):
        probe(path)


@pytest.mark.parametrize(
    ("pixel_aspect", "hw"), [("4/3", (112, 277)), ("1/2", (224, 208)), ("1/1", (112, 208))]
)
def test_pixels_become_square(tmp_path, pixel_aspect, hw):
    """Otherwise people in broadcast and DV material are squeezed."""
    path = write_video(tmp_path / "dv.mp4", range(3), pixel_aspect=pixel_aspect)
    info, frames = probe(path), decode_frames(path).frames_rgb
    assert (info.height, info.width) == frames.shape[1:3] == hw
    assert numbers_of(frames) == [0, 1, 2]
    assert str(info.pixel_aspect) == pixel_aspect.removesuffix("/1")


def test_pixels_that_cannot_be_meant_are_refused(tmp_path):
    path = write_video(tmp_path / "thin.mp4", range(2), pixel_aspect="10/1")
    with pytest.raises(UserVideoError, match="its pixels are 10 times as wide as high"):
        probe(path)


DEPTHS = [
    ("libx264", "yuv420p10le", "mp4"), ("libx265", "yuv420p10le", "mp4"), ("libsvtav1", "yuv420p10le", "mp4"),
    ("prores_ks", "yuv422p10le", "mov"), ("ffv1", "yuv420p", "mkv"), ("libvpx-vp9", "yuva420p", "webm"),
    ("libx264", "gray", "mp4"), ("mjpeg", "yuvj420p", "mov"), ("libvpx", "yuv420p", "webm"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "pix_fmt", "suffix"), DEPTHS)
def test_codecs_and_depths_show_the_same_pictures(tmp_path, codec, pix_fmt, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", range(8), codec=codec, pix_fmt=pix_fmt)
    frames = decode_frames(path).frames_rgb
    assert numbers_of(frames) == list(range(8))
    # PyAV interpolates chroma bilinearly, decord bicubically and where the file places it: edges differ a little.
    difference = np.abs(frames.astype(int) - oracle(path)[0])
    assert difference.mean() < 1
    np.testing.assert_array_equal(frames, decord_frames(path))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "hw"),
    [
        ("libx264", "yuv444p", "mp4", (177, 321)), ("libvpx-vp9", "yuv420p", "webm", (177, 321)),
        ("libx265", "yuv444p10le", "mkv", (177, 321)), ("libx264", "yuv420p", "mp4", (178, 322)),
        ("libx264", "yuv420p", "mp4", (178, 326)), ("libx264", "yuv444p", "mp4", (33, 47)),
    ],
)  # fmt: skip
def test_odd_sizes_keep_their_edges(tmp_path, codec, pix_fmt, suffix, hw):
    height, width = hw
    path = write_video(
        tmp_path / f"odd.{suffix}", range(4), height=height, width=width, codec=codec, pix_fmt=pix_fmt
    )
    info, frames = probe(path), decode_frames(path).frames_rgb
    assert (info.height, info.width) == frames.shape[1:3] == hw
    right = frames[:, 2:-8, -EDGE_PIXELS:].astype(int) - oracle(path)[0][:, 2:-8, -EDGE_PIXELS:]
    assert np.abs(right).mean() < 4
    assert frames[:, 2:-8, -1, 0].mean() > 150 > 60 > frames[:, 2:-8, -1, 2].mean()


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("ts", "libx264"), ("avi", "mpeg4"),
        ("mpg", "mpeg2video"), ("flv", "libx264"),
    ],
)  # fmt: skip
def test_containers_give_every_frame(tmp_path, suffix, codec):
    """decord loses the end of MPEG-TS ("Unable to handle EOF") and lands on wrong frames in AVI and MPEG-PS."""
    path = write_video(tmp_path / f"clip.{suffix}", range(160), codec=codec, options=B_FRAMES)
    batch = decode_frames(path)
    assert numbers_of(batch.frames_rgb) == list(range(160))
    seconds = oracle(path)[1]
    np.testing.assert_allclose(batch.pts_seconds, seconds - seconds[0], atol=1e-9)
    few = [1, 100, 101, 159]  # found by seeking
    np.testing.assert_array_equal(decode_frames(path, few).frames_rgb, batch.frames_rgb[few])


def test_frames_hidden_by_an_edit_list_are_not_shown(tmp_path):
    """`ffmpeg -ss ... -c copy` writes such files; decord shifts every frame and repeats the last one unseen."""
    whole = write_video(tmp_path / "whole.mp4", range(40), options=B_FRAMES)
    path = tmp_path / "cut.mp4"
    with av.open(str(whole)) as reader, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        shift = round(7 / 25 / reader.streams.video[0].time_base)
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writer.mux(packet)
    info, batch = probe(path), decode_frames(path)
    assert info.num_frames == 33
    assert numbers_of(batch.frames_rgb) == list(range(7, 40))
    np.testing.assert_allclose(batch.pts_seconds, np.arange(33) / 25, atol=1e-5)


@pytest.mark.parametrize("width", [96, 144])
def test_narrow_pictures_are_whole(tmp_path, width):
    """decord takes the padding of their rows for a fourth channel."""
    path = write_video(tmp_path / "narrow.mp4", range(3), width=width)
    np.testing.assert_array_equal(decode_frames(path).frames_rgb, oracle(path)[0])


def test_a_duration_beyond_all_memory_is_not_believed(tmp_path):
    """decord aborts the whole process with std::bad_alloc."""
    path = write_video(tmp_path / "eternal.mkv", range(6))
    data = bytearray(path.read_bytes())
    duration = data.find(b"\x44\x89\x88") + 3  # EBML id and size of Duration, a double
    assert struct.unpack_from(">d", data, duration) == (240.0,)
    struct.pack_into(">d", data, duration, 1e15)
    path.write_bytes(data)
    assert numbers_of(decode_frames(path).frames_rgb) == list(range(6))


def test_one_frame_is_a_video(tmp_path):
    path = write_video(tmp_path / "one.mp4", [3])
    info = probe(path)
    assert (info.num_frames, info.fps, info.duration_seconds) == (1, 25, pytest.approx(0.04))
    assert numbers_of(decode_frames(path).frames_rgb) == [3]
    assert sample_indices_by_time(info.pts_seconds, target_fps=16).tolist() == [0]


def test_sound_beside_the_picture_does_no_harm(tmp_path):
    path = write_video(tmp_path / "loud.mp4", range(10), audio=True)
    assert numbers_of(decode_frames(path).frames_rgb) == list(range(10))


def test_sound_alone_is_refused(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        write_tone(container, container.add_stream("aac", rate=16000))
    with pytest.raises(UserVideoError, match=r"song\.m4a: no video stream \(streams: audio\)"):
        probe(path)


@pytest.mark.parametrize("has_video", [True, False])
def test_a_cover_picture_is_no_video(tmp_path, has_video):
    path = tmp_path / "album.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=25) if has_video else None
        sound = container.add_stream("aac", rate=16000)
        if film is not None:
            film.height, film.width = 112, 208
        container.mux(cover.encode(av.VideoFrame(64, 64, "yuvj420p")))
        if film is not None:
            for number in range(6):
                container.mux(film.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
            container.mux(film.encode())
        write_tone(container, sound)
    if has_video:
        assert numbers_of(decode_frames(path).frames_rgb) == list(range(6))
    else:
        with pytest.raises(UserVideoError, match=r"no video stream \(only a cover picture, streams: audio\)"):
            probe(path)


def test_a_playlist_is_no_video(tmp_path):
    """FFmpeg would open what it names, wherever that is."""
    target = write_video(tmp_path / "target.mp4", range(3))
    path = tmp_path / "list.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserVideoError, match=r"list\.mp4: not a video that can be opened"):
        probe(path)


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    write_video(tmp_path / "take.mp4", range(3)).rename(tmp_path / "take:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert numbers_of(decode_frames("take:1.mp4").frames_rgb) == [0, 1, 2]
