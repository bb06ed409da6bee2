"""Encode clips as H.264 in MP4, with the quality measured on what decodes again."""

import io
import math
from fractions import Fraction
from typing import Any

import cv2
import numpy as np

from preprocessing.types import Frames, check_frames

MIN_PSNR_DB = 42.0
_BT601, _LIMITED_RANGE = 6, 1  # numbers of ITU-T H.273

# CRF values tried in turn, and x264 options beyond the preset's. The first CRF gives 43-49 dB on camera footage and
# face crops; noise and text need the later ones. "superfast" drops what costs time and hardly quality at 42 dB: for
# 90 frames of 480x832 it takes 0.8 s of one core and 3.1 MB, "ultrafast" 0.7 s and 5.0 MB, "medium" 3.6 s and 1.9 MB.
_LOSSLESS = (0,)
_LEAN = "bframes=0:cabac=0:no-deblock=1:rc-lookahead=0:mbtree=0"
PRESETS: dict[str, tuple[tuple[int, ...], dict[str, str]]] = {
    "ultrafast": ((11, 6, 2, 0), {}),
    "superfast": ((14, 9, 4, 0), {"tune": "psnr", "x264-params": _LEAN}),
    "medium": ((12, 8, 4, 0), {}),
}


def encode_mp4(
    frames_rgb: Frames, fps: float, *, min_psnr_db: float = MIN_PSNR_DB, preset: str = "superfast"
) -> tuple[bytes, dict[str, Any]]:
    """Encode (T, H, W, 3) frames as H.264 in MP4, at least `min_psnr_db` from the input when decoded.

    The result is decoded and measured; the quality rises until it suffices. 4:4:4 chroma, because 4:2:0 alone
    costs coloured edges several dB; one thread, so that the same frames always give the same bytes. `math.inf` asks
    for lossless coding at once, which black and white frames survive (others lose a little to the change of colours).
    Returns the bytes and the settings used, with the PSNR reached (99 for equal frames), for provenance.
    Raises ValueError for no frames, an unknown preset, or a PSNR beyond that of lossless coding.
    """
    check_frames(frames_rgb)
    if len(frames_rgb) == 0:
        raise ValueError("no frames to encode")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: use one of {', '.join(PRESETS)}")
    ladder, extra = PRESETS[preset]
    for crf in ladder if min_psnr_db < math.inf else _LOSSLESS:
        settings = {"codec": "libx264", "pix_fmt": "yuv444p", "crf": crf, "preset": preset, **extra}
        data = _encode(frames_rgb, fps, {"crf": str(crf), "preset": preset, **extra})
        reached = _decoded_psnr_db(data, frames_rgb)
        if reached >= min_psnr_db:
            return data, {**settings, "psnr_db": min(round(reached, 3), 99.0)}
    raise ValueError(f"lossless H.264 reaches {reached:.1f} dB, {min_psnr_db} dB was asked for: ask for less")


def _encode(frames_rgb: Frames, fps: float, options: dict[str, str]) -> bytes:
    import av
    from av.video.reformatter import VideoReformatter

    buffer = io.BytesIO()
    reformatter = VideoReformatter()  # one for all frames: each prepares its tables anew
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1_000_000)
        stream = container.add_stream("libx264", rate=rate, options={**options, "threads": "1", "flags": "+bitexact"})
        stream.height, stream.width = frames_rgb.shape[1:3]
        stream.pix_fmt = "yuv444p"
        # Say what the conversion from RGB uses, or players guess BT.709 for large pictures and shift colours.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        for frame_rgb in frames_rgb:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_rgb), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(frame, format="yuv444p", threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _decoded_psnr_db(data: bytes, expected_rgb: Frames) -> float:
    """PSNR of the video in `data`, decoded as `wan_accel.data.clips.decode_mp4` does; a frame in memory at a time."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter, squared = VideoReformatter(), 0.0
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame, expected in zip(container.decode(video=0), expected_rgb, strict=True):
            decoded = reformatter.reformat(frame, format="rgb24", threads=1)
            squared += _squared_error(decoded.to_ndarray().astype(np.uint8, copy=False), expected)
    return _psnr_db(squared, expected_rgb.size)


def psnr_db(frames_rgb: Frames, expected_rgb: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; inf for equal frames.

    Raises ValueError where the shapes, and so the number of frames, differ.
    """
    if frames_rgb.shape != expected_rgb.shape:
        raise ValueError(f"frames of shape {frames_rgb.shape} compared with {expected_rgb.shape}")
    squared = sum(_squared_error(a, b) for a, b in zip(frames_rgb, expected_rgb, strict=True))
    return _psnr_db(squared, frames_rgb.size)


def _squared_error(frame_rgb: Frames, expected_rgb: Frames) -> float:
    return float(cv2.norm(frame_rgb.reshape(-1), expected_rgb.reshape(-1), cv2.NORM_L2SQR))


def _psnr_db(squared_error: float, num_values: int) -> float:
    return math.inf if squared_error == 0 else 10 * math.log10(255**2 * num_values / squared_error)
