"""How the pictures of a video are meant to be seen: turned upright, with square pixels."""

import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.video_error import UserVideoError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_MAX_PIXELS = 1 << 26  # a damaged header can announce pictures that fill the memory
_MAX_STRETCH = 4

Turn = tuple[int, int, int, int]

# Filters that bring a picture upright, by the signs of a, b, c, d in the display matrix (x', y') = (ax + cy, bx + dy).
UPRIGHT: dict[Turn, tuple[str, ...]] = {
    (1, 0, 0, 1): (),
    (0, 1, -1, 0): ("transpose=clock",),
    (-1, 0, 0, -1): ("hflip", "vflip"),
    (0, -1, 1, 0): ("transpose=cclock",),
    (-1, 0, 0, 1): ("hflip",),
    (1, 0, 0, -1): ("vflip",),
    (0, 1, 1, 0): ("transpose=cclock_flip",),
    (0, -1, -1, 0): ("transpose=clock_flip",),
}
_NOT_A_TURN = (0, 0, 0, 0)
_BY_ROTATE_TAG = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def read_turn(path: Path, stream: "VideoStream", first: "VideoFrame") -> Turn:
    """Read the turn that a display matrix or else, in old mkv files, a `rotate` tag asks for.

    Raises UserVideoError unless it is a key of UPRIGHT.
    """
    turn: Turn = (1, 0, 0, 1)
    tag = next((value for key, value in stream.metadata.items() if key.lower() == "rotate"), None)
    side_data: Any = first.side_data.get("DISPLAYMATRIX")
    if side_data is not None:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data)[:36])
        turn = _signs(a, b, c, d)
    elif tag is not None:
        turn = _BY_ROTATE_TAG.get(int(tag) % 360, _NOT_A_TURN) if re.fullmatch("-?[0-9]+", tag) else _NOT_A_TURN
    if turn not in UPRIGHT:
        raise UserVideoError(
            f"{path}: to be shown turned or skewed by other than quarter turns; re-encode it: ffmpeg -i IN OUT.mp4"
        )
    return turn


def _signs(a: int, b: int, c: int, d: int) -> Turn:
    """Signs of a matrix that turns by quarters and scales both sides alike; zeros for any other."""
    largest = max(abs(value) for value in (a, b, c, d))
    signs = [round(value / largest) if largest else 0 for value in (a, b, c, d)]
    exact = all(abs(value - sign * largest) <= largest / 256 for value, sign in zip((a, b, c, d), signs))
    return (signs[0], signs[1], signs[2], signs[3]) if exact else _NOT_A_TURN


def read_pixel_aspect(path: Path, stream: "VideoStream") -> Fraction:
    """Width of a stored pixel over its height; 1 where the file does not say."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not Fraction(1, _MAX_STRETCH) <= aspect <= _MAX_STRETCH:
        raise UserVideoError(f"{path}: its pixels are {aspect} times as wide as high, which cannot be meant")
    return aspect


def shown_hw(path: Path, first: "VideoFrame", turn: Turn, pixel_aspect: Fraction) -> tuple[int, int]:
    """Height and width upright with square pixels: the shorter side of a pixel grows, so that nothing is lost."""
    width = round(first.width * max(pixel_aspect, Fraction(1)))
    height = round(first.height / min(pixel_aspect, Fraction(1)))
    if height * width > _MAX_PIXELS:
        raise UserVideoError(f"{path}: pictures of {width}x{height}, beyond {_MAX_PIXELS} pixels; make it smaller")
    return (height, width) if turn[0] else (width, height)
