"""Video files: what is in them, and their frames, a chunk at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from preprocessing.container import Contents, read_contents
from preprocessing.encoding import MIN_PSNR_DB, encode_mp4, psnr_db
from preprocessing.frame_reader import read_frames
from preprocessing.sampling import sample_indices, sample_indices_by_time
from preprocessing.types import Float, FrameBatch, Int
from preprocessing.video_error import UserVideoError

__all__ = [
    "MIN_PSNR_DB",
    "UserVideoError",
    "VideoInfo",
    "decode_frames",
    "encode_mp4",
    "probe",
    "psnr_db",
    "sample_indices",
    "sample_indices_by_time",
    "sha256_file",
    "stream_frames",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoInfo:
    """What `probe` found in a file.

    height, width: of the picture as shown: turned upright where the file says so, its pixels made square.
    pts_seconds: (num_frames,) float64, when each frame is shown, in seconds after the first.
    duration_seconds: when the last one ends. fps: average rate as the file states it.
    pixel_aspect: width of a stored pixel over its height.
    """

    path: Path
    sha256: str
    num_frames: int
    fps: float
    duration_seconds: float
    height: int
    width: int
    pts_seconds: Float
    codec: str
    pixel_format: str
    pixel_aspect: Fraction


def probe(path: str | Path) -> VideoInfo:
    """Read a video's size, rate, frame times and hash; reads every packet, decodes one frame.

    Raises UserVideoError for a file that is missing, no video, or cut short; see `read_contents`.
    """
    contents = read_contents(path)
    return VideoInfo(
        path=contents.path,
        sha256=sha256_file(path),
        num_frames=contents.num_frames,
        fps=contents.fps,
        duration_seconds=float(contents.seconds(contents.end_pts)),
        height=contents.height,
        width=contents.width,
        pts_seconds=contents.seconds(contents.pts),
        codec=contents.codec,
        pixel_format=contents.pixel_format,
        pixel_aspect=contents.pixel_aspect,
    )


def stream_frames(
    path: str | Path, indices: Sequence[int] | Int, *, chunk_frames: int = 32
) -> Iterator[FrameBatch]:
    """Decode frames `indices`, each not before the last, in chunks; repeats are decoded once.

    Memory holds one chunk, however long the video and however slow the caller. Frames are read straight through,
    only a gap that skips key frames is jumped. Stop at any time: closing or dropping the iterator closes the file.
    Damage inside a frame that FFmpeg's decoder conceals is not noticed here.

    Raises ValueError for indices out of order, and UserVideoError, naming the frame, where one does not exist or
    the stream is damaged (frames before it have been given by then).
    """
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames={chunk_frames}: give at least 1")
    contents = read_contents(path)
    wanted = _checked(contents, indices)
    if (np.diff(wanted) < 0).any():
        raise ValueError(f"{path}: frames asked for out of order; sort them, or use decode_frames")
    return _chunks(contents, wanted, chunk_frames)


def decode_frames(path: str | Path, indices: Sequence[int] | Int | None = None) -> FrameBatch:
    """Decode frames `indices` (default: all) in the order given, all into memory.

    Raises UserVideoError, naming the frame, where one does not exist or the stream is damaged.
    """
    contents = read_contents(path)
    wanted = _checked(contents, np.arange(contents.num_frames) if indices is None else indices)
    rising, places = np.unique(wanted, return_inverse=True)
    frames = np.empty((len(rising), contents.height, contents.width, 3), np.uint8)
    with closing(read_frames(contents, rising)) as decoded:
        for slot, frame in zip(frames, decoded, strict=True):
            slot[...] = frame
    is_rising = np.array_equal(rising, wanted)
    return FrameBatch(
        frames_rgb=frames if is_rising else frames[places], pts_seconds=contents.seconds(contents.pts[wanted])
    )


def _checked(contents: Contents, indices: Sequence[int] | Int) -> Int:
    wanted = np.asarray(indices, np.int64).reshape(-1)
    outside = wanted[(wanted < 0) | (wanted >= contents.num_frames)]
    if len(outside):
        raise UserVideoError(
            f"{contents.path}: frame {outside[0]} was asked for, it has frames 0..{contents.num_frames - 1}"
        )
    return wanted


def _chunks(contents: Contents, indices: Int, chunk_frames: int) -> Iterator[FrameBatch]:
    pts_seconds = contents.seconds(contents.pts[indices])
    with closing(read_frames(contents, indices)) as decoded:
        for start in range(0, len(indices), chunk_frames):
            chunk = slice(start, start + chunk_frames)
            num_frames = len(indices[chunk])
            frames = np.empty((num_frames, contents.height, contents.width, 3), np.uint8)
            for slot in frames:
                slot[...] = next(decoded)
            yield FrameBatch(frames_rgb=frames, pts_seconds=pts_seconds[chunk])


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
