import hashlib
import io
import math
from pathlib import Path

import av
import numpy as np
import pytest

from preprocessing.encoding import PRESETS
from preprocessing.types import FrameBatch
from preprocessing.video import (
    UserVideoError,
    decode_frames,
    encode_mp4,
    probe,
    psnr_db,
    sample_indices,
    sample_indices_by_time,
    stream_frames,
)
from wan_accel.data.clips import decode_mp4

VIDEOS = Path(__file__).parents[2] / "demo/videos"


def noise_frames(num_frames=5, height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_probe_tells_what_a_file_holds():
    info = probe(VIDEOS / "walker.mp4")
    assert (info.num_frames, info.height, info.width) == (90, 832, 480)
    assert info.fps == pytest.approx(30)
    assert info.duration_seconds == pytest.approx(3, abs=1e-5)
    np.testing.assert_allclose(info.pts_seconds, np.arange(90) / 30, atol=1e-5)
    assert info.sha256 == hashlib.sha256((VIDEOS / "walker.mp4").read_bytes()).hexdigest()


def test_every_frame_of_a_vp9_file_decodes():
    """decord with more than one thread loses this file at frame 11."""
    batch = decode_frames(VIDEOS / "original_vp9_head.mp4")
    assert batch.frames_rgb.shape == (30, 994, 1768, 3)


def test_chosen_frames_come_in_the_order_asked_for():
    everything = decode_frames(VIDEOS / "jumping.mp4", range(20)).frames_rgb
    batch = decode_frames(VIDEOS / "jumping.mp4", [17, 3, 3, 9])
    np.testing.assert_array_equal(batch.frames_rgb, everything[[17, 3, 3, 9]])
    np.testing.assert_allclose(batch.pts_seconds, np.array([17, 3, 3, 9]) / 30, atol=1e-5)


def test_decoding_nothing_gives_an_empty_batch():
    assert decode_frames(VIDEOS / "jumping.mp4", []).frames_rgb.shape == (0, 768, 512, 3)


@pytest.mark.parametrize("entry", [probe, decode_frames])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"clip\.mp4: no such file"),
        (b"", r"clip\.mp4: not a video that can be opened"),
        (b"hello, this is text\n" * 50, r"clip\.mp4: not a video that can be opened"),
    ],
)
def test_files_that_are_no_video_are_named(tmp_path, entry, content, message):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserVideoError, match=message):
        entry(path)


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.mp4"
    data = (VIDEOS / "walker.mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserVideoError, match=r"cut\.mp4: its header announces 90 frames.*cut short"):
        probe(path)
    with pytest.raises(UserVideoError, match="cut short"):
        stream_frames(path, [0])


def test_a_damaged_frame_is_named_after_the_good_ones(tmp_path):
    path = tmp_path / "damaged.mp4"
    data = bytearray((VIDEOS / "original_vp9_head.mp4").read_bytes())
    with av.open(str(VIDEOS / "original_vp9_head.mp4")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
        data[packet.pos : packet.pos + 8] = bytes(8)
    path.write_bytes(data)
    good = []
    with pytest.raises(UserVideoError, match=r"damaged\.mp4: frame \d+ of 30 does not decode.*re-encode it"):
        for batch in stream_frames(path, range(30), chunk_frames=1):
            good += list(batch.frames_rgb)
    np.testing.assert_array_equal(good, decode_frames(VIDEOS / "original_vp9_head.mp4", range(20)).frames_rgb)


def test_a_frame_beyond_the_end_is_an_error():
    with pytest.raises(UserVideoError, match=r"frame 90 was asked for, it has frames 0\.\.89"):
        decode_frames(VIDEOS / "walker.mp4", [0, 90])


def test_frames_and_times_must_agree():
    with pytest.raises(ValueError, match="give one time a frame"):
        FrameBatch(frames_rgb=noise_frames(5), pts_seconds=np.zeros(4))
    with pytest.raises(ValueError, match=r"expected RGB uint8 \(T, H, W, 3\)"):
        FrameBatch(frames_rgb=noise_frames(5)[..., 0], pts_seconds=np.zeros(5))


@pytest.mark.parametrize(
    ("target_fps", "expected"), [(30, range(9)), (15, range(0, 9, 2)), (60, [0, 1, 1, 2, 2, 3, 3])]
)
def test_sampling_by_time_on_an_even_video(target_fps, expected):
    indices = sample_indices_by_time(np.arange(9) / 30, target_fps=target_fps)
    np.testing.assert_array_equal(indices[: len(expected)], list(expected))
    assert indices[-1] == 8


def test_sampling_by_time_follows_a_variable_rate():
    pts = np.array([0, 0.1, 0.2, 0.6, 1.0, 1.01, 1.02])  # slow in the middle, a burst at the end
    indices = sample_indices_by_time(pts, target_fps=10)
    np.testing.assert_array_equal(indices, [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4])
    assert (np.abs(pts[indices] - np.arange(11) / 10) <= 0.2 + 1e-9).all()


def test_sampling_a_window():
    pts = 5 + np.arange(300) / 30
    indices = sample_indices_by_time(pts, target_fps=16, start_seconds=7.0, num_samples=17)
    assert len(indices) == 17
    assert np.abs(pts[indices] - (7 + np.arange(17) / 16)).max() <= 0.5 / 30 + 1e-6


def test_sampling_needs_a_rate():
    with pytest.raises(ValueError, match="target_fps=0: give a positive number"):
        sample_indices_by_time(np.arange(3.0), target_fps=0)


def test_sampling_by_rate_stays_inside_a_video_with_a_wrong_duration():
    indices = sample_indices(50, video_fps=25, target_fps=25, duration_seconds=10)
    assert indices.max() == 49


def test_psnr_closed_form():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == math.inf
    assert psnr_db(black + np.uint8(255), black) == pytest.approx(0)
    assert psnr_db(black + np.uint8(51), black) == pytest.approx(20 * math.log10(5))
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\) compared with \(2, 4, 4, 3\)"):
        psnr_db(black[:1], black)


@pytest.mark.parametrize("video", ["walker.mp4", "jumping.mp4"])
def test_encoded_footage_keeps_every_frame_at_42_db(video):
    frames = decode_frames(VIDEOS / video, range(13)).frames_rgb
    data, settings = encode_mp4(frames, 30)
    assert psnr_db(decode_mp4(data), frames) >= 42
    assert settings["psnr_db"] == pytest.approx(psnr_db(decode_mp4(data), frames), abs=1e-3)
    assert (settings["crf"], settings["preset"]) == (14, "superfast")  # the first try suffices
    assert len(data) < frames.nbytes / 20


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reaches_42_db_at_its_first_crf(preset):
    frames = decode_frames(VIDEOS / "two_people.mp4", range(7)).frames_rgb
    data, settings = encode_mp4(frames, 30, preset=preset)
    assert settings["crf"] == PRESETS[preset][0][0]
    assert psnr_db(decode_mp4(data), frames) >= 42


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset='slow': use one of ultrafast, superfast, medium"):
        encode_mp4(noise_frames(1), 30, preset="slow")


def test_what_is_encoded_decodes_alike_from_a_file(tmp_path):
    frames = decode_frames(VIDEOS / "walker.mp4", range(9)).frames_rgb
    data, _ = encode_mp4(frames, 16)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    info, batch = probe(path), decode_frames(path)
    assert info.fps == pytest.approx(16)
    np.testing.assert_array_equal(batch.frames_rgb, decode_mp4(data))
    np.testing.assert_allclose(batch.pts_seconds, np.arange(9) / 16, atol=1e-5)


def test_encoded_video_says_how_its_colours_are_meant():
    data, _ = encode_mp4(np.full((2, 1080, 64, 3), (200, 30, 90), np.uint8), 30)
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_range) == (6, 6, 1)
    assert np.abs(decode_mp4(data).astype(int) - (200, 30, 90)).max() <= 2


def test_noise_gets_the_quality_it_needs():
    frames = noise_frames()
    data, settings = encode_mp4(frames, 30)
    assert psnr_db(decode_mp4(data), frames) >= 42
    assert settings["crf"] < 14


def test_encoding_is_deterministic():
    frames = decode_frames(VIDEOS / "jumping.mp4", range(5)).frames_rgb
    assert encode_mp4(frames, 30000 / 1001) == encode_mp4(frames, 30000 / 1001)


def test_one_frame_and_odd_sizes_encode():
    frames = noise_frames(1, 33, 47)
    assert decode_mp4(encode_mp4(frames, 24)[0]).shape == frames.shape


def test_a_quality_beyond_lossless_is_refused():
    with pytest.raises(ValueError, match=r"lossless H\.264 reaches .* 120 dB was asked for"):
        encode_mp4(noise_frames(2), 30, min_psnr_db=120)
    with pytest.raises(ValueError, match="no frames to encode"):
        encode_mp4(noise_frames(0), 30)


def test_black_and_white_frames_are_lossless_at_once():
    frames = (noise_frames(3)[..., :1] > 127).repeat(3, axis=-1).astype(np.uint8) * 255
    data, settings = encode_mp4(frames, 30, min_psnr_db=math.inf)
    assert (decode_mp4(data) == frames).all()
    assert (settings["crf"], settings["psnr_db"]) == (0, 99.0)
