"""A contact sheet of drawn videos: ground truth above sample, a column a moment. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NUM_COLUMNS = 6
_TILE_HEIGHT, _MIN_TILE_WIDTH, _MAX_TILE_WIDTH, _GAP, _LABEL_WIDTH, _MARGIN = 180, 48, 260, 4, 104, 12
_TITLE_HEIGHT, _CLIP_HEIGHT = 36, 44
_INK, _PALE, _PAPER = (24, 26, 30), (110, 115, 125), (250, 250, 248)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SheetClip:
    """A clip on the sheet. `truth` and `sample` are (n, H, W, 3) uint8 at the `moments`, in seconds."""

    name: str
    caption: str
    moments: tuple[float, ...]
    truth: np.ndarray
    sample: np.ndarray


def columns_of(num_frames: int) -> np.ndarray:
    """The frames that a sheet shows: `NUM_COLUMNS` evenly spaced ones, first and last among them."""
    return np.linspace(0, num_frames - 1, min(NUM_COLUMNS, num_frames)).round().astype(int)


def sample_sheet(clips: Sequence[SheetClip], *, title: str, label: str) -> Image.Image:
    """Lay clips out below each other.

    Args:
        clips: at least one.
        title: a line at the top.
        label: what the samples are called, e.g. `step 500`; beside the upper row stands "ground truth".
    """
    width = 2 * _MARGIN + _LABEL_WIDTH + max(len(clip.moments) * _column_width(clip) for clip in clips)
    height = _TITLE_HEIGHT + sum(_CLIP_HEIGHT + 2 * (_tile_size(clip.truth)[1] + _GAP) for clip in clips) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 10), _shortened(title, width - 2 * _MARGIN, 15), fill=_INK, font=_font(15))
    top = _TITLE_HEIGHT
    for clip in clips:
        _draw_header(draw, clip, top, width)
        top += _CLIP_HEIGHT
        for name, frames in (("ground truth", clip.truth), (label, clip.sample)):
            top = _draw_frames(sheet, draw, name, frames, top, _column_width(clip))
    return sheet


def _draw_header(draw: ImageDraw.ImageDraw, clip: SheetClip, top: int, width: int) -> None:
    """A rule, the clip's name and caption, and the time above each column."""
    draw.line((_MARGIN, top + 1, width - _MARGIN, top + 1), fill=(225, 225, 222))
    text = f"{clip.name}  “{clip.caption}”" if clip.caption else f"{clip.name}  (no caption)"
    draw.text((_MARGIN, top + 7), _shortened(text, width - 2 * _MARGIN, 13), fill=_INK, font=_font(13))
    for number, moment in enumerate(clip.moments):
        left = _MARGIN + _LABEL_WIDTH + number * _column_width(clip)
        draw.text((left, top + 28), f"{moment:.2f} s", fill=_PALE, font=_font(11))


def _draw_frames(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, name: str, frames: np.ndarray, top: int, column: int
) -> int:
    """One labelled row of pictures; returns where the next one starts."""
    width, height = _tile_size(frames)
    draw.text((_MARGIN, top + height // 2 - 8), name, fill=_INK, font=_font(13))
    for number, frame in enumerate(frames):
        tile = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (_MARGIN + _LABEL_WIDTH + number * column, top))
    return top + height + _GAP


def _column_width(clip: SheetClip) -> int:
    """From one picture's left edge to the next one's."""
    return max(_tile_size(clip.truth)[0], _MIN_TILE_WIDTH) + _GAP


def _tile_size(frames: np.ndarray) -> tuple[int, int]:
    """Width and height of a picture on the sheet: as high as a row, or as wide as a column may be."""
    height, width = frames.shape[1:3]
    scale = min(_TILE_HEIGHT / height, _MAX_TILE_WIDTH / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shortened(text: str, width: int, size: int) -> str:
    """Cut a line off where the sheet ends."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + " …") > width:
        text = text[:-1]
    return text.rstrip() + " …"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
