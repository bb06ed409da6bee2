"""Videos made with PyAV whose frames carry their number, and PyAV as the oracle of what they show."""

import struct
from fractions import Fraction

import av
import numpy as np

EDGE_PIXELS = 3


def numbered_frame(number, height=112, width=208):
    """A gradient with `number` as 8 bright or dark blocks, a red right edge and a blue bottom edge."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 128)], axis=2).astype(np.uint8)
    for bit in range(8):
        frame[height // 4 : height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    frame[:, -EDGE_PIXELS:] = (255, 0, 0)
    frame[-EDGE_PIXELS:, :] = (0, 0, 255)
    return frame


def number_shown(frame):
    height, width = frame.shape[:2]
    row = frame[3 * height // 8].mean(axis=1)
    return sum(int(row[(2 * bit + 1) * width // 16] > 128) << bit for bit in range(8))


def write_video(
    path, numbers=range(20), *, height=112, width=208, codec="libx264", pix_fmt="yuv420p", options=None,
    pts_ms=None, container_options=None, pixel_aspect=None, audio=False, metadata=None,
):  # fmt: skip
    """Write numbered frames at 25 a second, or at `pts_ms` milliseconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.metadata.update(metadata or {})
        sound = container.add_stream("aac", rate=16000) if audio else None
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if pts_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = int(pts_ms[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode())
        if sound is not None:
            write_tone(container, sound)
    return path


def write_tone(container, stream, num_samples=16000):
    for start in range(0, num_samples, 1024):
        samples = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def with_display_matrix(source, target, a, b, c, d):
    """Copy an MP4 with another turn in its track header: (x', y') = (ax + cy, bx + dy)."""
    data = bytearray(source.read_bytes())
    tkhd = data.find(b"tkhd")
    offset = tkhd + 4 + (52 if data[tkhd + 4] == 1 else 40)  # after version, times, track number, duration, layer, ...
    one = 1 << 16
    matrix = [round(a * one), round(b * one), 0, round(c * one), round(d * one), 0, 0, 0, 1 << 30]
    assert struct.unpack_from(">9i", data, offset) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, offset, *matrix)
    target.write_bytes(data)
    return target


def oracle(path):
    """(T, H, W, 3) RGB frames of PyAV as stored, (T,) seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.array([f.time for f in frames])
