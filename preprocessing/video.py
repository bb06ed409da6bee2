"""Video files: what is in them, which frames to take, decoding and encoding."""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.types import Float, FrameBatch, Frames, Int, check_frames
from wan_accel.data.clips import decode_mp4

if TYPE_CHECKING:
    import decord

MIN_PSNR_DB = 42.0
_CRF_LADDER = (12, 8, 4, 0)  # 12 gives 43-45 dB on camera footage; noise and text need the lower ones
_BT601, _LIMITED_RANGE = 6, 1  # numbers of ITU-T H.273
_TIME_TOLERANCE_SECONDS = 1e-6


class UserVideoError(ValueError):
    """A video that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoInfo:
    """What `probe` found in a file. `pts_seconds` (num_frames,) is when each frame is shown."""

    path: Path
    sha256: str
    num_frames: int
    fps: float
    duration_seconds: float
    height: int
    width: int
    pts_seconds: Float


def probe(path: str | Path) -> VideoInfo:
    """Read a video's size, rate, frame times and hash; decodes one frame.

    Raises UserVideoError for a file that is missing, no video, or cut short.
    """
    path = Path(path)
    reader = _open(path)
    declared = _declared_num_frames(path)
    if declared > len(reader):
        raise UserVideoError(
            f"{path}: its header announces {declared} frames, {len(reader)} can be read: "
            "the file is cut short; copy or download it again"
        )
    span_seconds = np.asarray(reader.get_frame_timestamp(range(len(reader))), np.float64)
    height, width = _decode(path, reader, [0])[0].shape[:2]
    return VideoInfo(
        path=path,
        sha256=sha256_file(path),
        num_frames=len(reader),
        fps=float(reader.get_avg_fps()),
        duration_seconds=float(span_seconds[-1, 1]),
        height=height,
        width=width,
        pts_seconds=span_seconds[:, 0],
    )


def decode_frames(path: str | Path, indices: Sequence[int] | Int | None = None) -> FrameBatch:
    """Decode frames `indices` (default: all) in the order given.

    Raises UserVideoError, naming the frames, where the stream is damaged.
    """
    path = Path(path)
    reader = _open(path)
    wanted = list(range(len(reader))) if indices is None else [int(i) for i in indices]
    outside = [i for i in wanted if not 0 <= i < len(reader)]
    if outside:
        raise UserVideoError(f"{path}: frame {outside[0]} was asked for, it has frames 0..{len(reader) - 1}")
    frames_rgb = _decode(path, reader, wanted)
    pts_seconds = np.asarray(reader.get_frame_timestamp(wanted), np.float64).reshape(-1, 2)[:, 0]
    return FrameBatch(frames_rgb=frames_rgb, pts_seconds=pts_seconds)


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> "decord.VideoReader":
    import decord

    if not path.is_file():
        raise UserVideoError(f"{path}: no such file")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # One thread: with more by default, decord2 3.4 fails on VP9 files ("Error sending packet").
        reader = decord.VideoReader(str(path), num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        raise UserVideoError(f"{path}: not a video that can be opened; give an mp4, mkv or webm") from error
    if len(reader) == 0:
        raise UserVideoError(f"{path}: the video has no frames")
    return reader


def _decode(path: Path, reader: "decord.VideoReader", indices: list[int]) -> Frames:
    import decord

    if not indices:
        return np.zeros((0, *reader[0].shape), np.uint8)
    try:
        frames: Frames = reader.get_batch(indices).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise UserVideoError(
            f"{path}: frames {indices[0]}..{indices[-1]} do not decode, the stream is damaged; "
            "copy or download the file again, or re-encode it with ffmpeg"
        ) from error
    return frames


def _declared_num_frames(path: Path) -> int:
    import av

    try:
        with av.open(str(path)) as container:
            return int(container.streams.video[0].frames)  # 0 where the container does not say
    except (av.FFmpegError, IndexError) as error:
        raise UserVideoError(f"{path}: no readable video stream ({error})") from error


def sample_indices(num_frames: int, *, video_fps: float, target_fps: float, duration_seconds: float) -> Int:
    """Choose frames for `target_fps` (-1: the video's own) from the average rate, as Wan2.2 does.

    Returns int64 indices, all < num_frames. Assumes a constant frame rate; see `sample_indices_by_time`.
    """
    expected = int(duration_seconds * video_fps + 0.5)
    # The original then samples `expected` frames and may read beyond the end; the clip below keeps it inside.
    counted = expected if abs(num_frames - expected) / num_frames > 0.1 else num_frames
    fps = video_fps if target_fps == -1 else target_fps
    num_samples = int(counted / video_fps * fps)
    indices = np.round(np.arange(num_samples) / fps * video_fps).astype(np.int64)
    return np.clip(indices, 0, num_frames - 1)


def sample_indices_by_time(
    pts_seconds: Float,
    *,
    target_fps: float,
    start_seconds: float | None = None,
    num_samples: int | None = None,
) -> Int:
    """Choose the frame nearest to each instant start + i / target_fps; correct for variable frame rates.

    `start_seconds` defaults to the first frame. Without `num_samples`, instants run while they lie less than
    half a target period after the last frame. Returns int64 indices; a tie goes to the later frame.
    """
    if target_fps <= 0:
        raise ValueError(f"target_fps={target_fps}: give a positive number of frames a second")
    start = float(pts_seconds[0]) if start_seconds is None else start_seconds
    if num_samples is None:
        span = float(pts_seconds[-1]) - start
        num_samples = max(0, math.floor(span * target_fps + 0.5 - _TIME_TOLERANCE_SECONDS) + 1)
    instants = start + np.arange(num_samples) / target_fps
    midpoints = (pts_seconds[1:] + pts_seconds[:-1]) / 2
    return np.searchsorted(midpoints, instants + _TIME_TOLERANCE_SECONDS, side="right").astype(np.int64)


def encode_mp4(
    frames_rgb: Frames, fps: float, *, min_psnr_db: float = MIN_PSNR_DB, preset: str = "medium"
) -> tuple[bytes, dict[str, Any]]:
    """Encode (T, H, W, 3) frames as H.264 in MP4, at least `min_psnr_db` from the input when decoded.

    The result is decoded and measured; the quality rises until it suffices. 4:4:4 chroma, because 4:2:0 alone
    costs coloured edges several dB; one thread, so that the same frames always give the same bytes.
    Returns the bytes and the settings used, with the PSNR reached, for provenance.
    """
    check_frames(frames_rgb)
    if len(frames_rgb) == 0:
        raise ValueError("no frames to encode")
    for crf in _CRF_LADDER:
        settings = {"codec": "libx264", "pix_fmt": "yuv444p", "crf": crf, "preset": preset}
        data = _encode(frames_rgb, fps, crf=crf, preset=preset)
        reached = psnr_db(decode_mp4(data), frames_rgb)
        if reached >= min_psnr_db:
            return data, {**settings, "psnr_db": min(round(reached, 3), 99.0)}
    raise ValueError(f"lossless H.264 reaches {reached:.1f} dB, {min_psnr_db} dB was asked for: ask for less")


def _encode(frames_rgb: Frames, fps: float, *, crf: int, preset: str) -> bytes:
    from fractions import Fraction

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1_000_000)
        options = {"crf": str(crf), "preset": preset, "threads": "1", "flags": "+bitexact"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames_rgb.shape[1:3]
        stream.pix_fmt = "yuv444p"
        # Say what the conversion from RGB uses, or players guess BT.709 for large pictures and shift colours.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        for frame in frames_rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def psnr_db(frames_rgb: Frames, expected_rgb: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; inf for equal frames.

    Raises ValueError where the shapes, and so the number of frames, differ.
    """
    if frames_rgb.shape != expected_rgb.shape:
        raise ValueError(f"frames of shape {frames_rgb.shape} compared with {expected_rgb.shape}")
    squared = sum(
        float(np.square(a.astype(np.int32) - b).sum()) for a, b in zip(frames_rgb, expected_rgb, strict=True)
    )
    return math.inf if squared == 0 else 10 * math.log10(255**2 * frames_rgb.size / squared)
