"""A contact sheet of drawn videos: ground truth above sample, a column a moment. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from wan_accel.sheet_text import INK, PALE, PAPER, font, shortened

NUM_COLUMNS = 6
_TILE_HEIGHT, _MIN_TILE_WIDTH, _MAX_TILE_WIDTH, _GAP, _LABEL_WIDTH, _MARGIN = 180, 48, 260, 4, 104, 12
_TITLE_HEIGHT, _CLIP_HEIGHT = 36, 44


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
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 10), shortened(title, width - 2 * _MARGIN, 15), fill=INK, font=font(15))
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
    draw.text((_MARGIN, top + 7), shortened(text, width - 2 * _MARGIN, 13), fill=INK, font=font(13))
    for number, moment in enumerate(clip.moments):
        left = _MARGIN + _LABEL_WIDTH + number * _column_width(clip)
        draw.text((left, top + 28), f"{moment:.2f} s", fill=PALE, font=font(11))


def _draw_frames(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, name: str, frames: np.ndarray, top: int, column: int
) -> int:
    """One labelled row of pictures; returns where the next one starts."""
    width, height = _tile_size(frames)
    draw.text((_MARGIN, top + height // 2 - 8), name, fill=INK, font=font(13))
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
