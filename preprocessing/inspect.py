"""Contact sheets: one picture a clip that shows whether its parts belong together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocessing.masks import blacken
from preprocessing.skeleton import draw_poses
from preprocessing.types import Frames
from wan_accel.data import store
from wan_accel.data.clips import Clip, load_clip
from wan_accel.data.schema import CLIPS_SCHEMA

NUM_COLUMNS = 6
_TILE_HEIGHT = 224
_GAP, _LABEL_WIDTH, _HEADER_HEIGHT = 6, 104, 58
_INK, _PALE, _PAPER = (24, 26, 30), (110, 115, 125), (250, 250, 248)
_MASK_COLOR = np.array([230, 40, 90])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SheetRow:
    """A labelled row of pictures, one a time step."""

    label: str
    pictures: list[Frames]


def write_sheets(dataset: Path, output: Path, *, num_clips: int | None = None) -> list[Path]:
    """Write `<clip_id>.png` for the clips of a dataset, evenly spread if fewer than all are asked for."""
    clips = store.load(dataset, CLIPS_SCHEMA)
    output.mkdir(parents=True, exist_ok=True)
    rows = np.arange(len(clips))
    if num_clips is not None and num_clips < len(clips):
        rows = np.linspace(0, len(clips) - 1, num_clips).round().astype(int)
    paths = []
    for index in rows.tolist():
        row = clips[index]
        path = output / f"{row['clip_id']}.png"
        contact_sheet(load_clip(row), row).save(path)
        paths.append(path)
    return paths


def contact_sheet(clip: Clip, row: Mapping[str, Any]) -> Image.Image:
    """Lay a clip out: frame, reference, pose, face, mask and background over time."""
    steps = np.linspace(0, len(clip.frames_rgb) - 1, NUM_COLUMNS).round().astype(int)
    rows = sheet_rows(clip, steps)
    widths = [max(_scaled_width(sheet.pictures[i]) for sheet in rows) for i in range(len(steps))]
    width = _LABEL_WIDTH + sum(widths) + _GAP * (len(widths) + 1)
    height = _HEADER_HEIGHT + len(rows) * (_TILE_HEIGHT + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, clip, row, steps, widths)
    for number, sheet_row in enumerate(rows):
        top = _HEADER_HEIGHT + number * (_TILE_HEIGHT + _GAP)
        draw.text((10, top + _TILE_HEIGHT // 2 - 8), sheet_row.label, fill=_INK, font=_font(15))
        left = _LABEL_WIDTH
        for picture, column in zip(sheet_row.pictures, widths):
            tile = Image.fromarray(picture).resize((_scaled_width(picture), _TILE_HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + (column - tile.width) // 2, top))
            left += column + _GAP
    return sheet


def sheet_rows(clip: Clip, steps: np.ndarray) -> list[SheetRow]:
    """The rows of a clip at the frames `steps`; parts that it does not have are left out."""
    frames = clip.frames_rgb[steps]
    rows = [SheetRow(label="frame", pictures=list(frames))]
    if clip.reference_rgb is not None:
        rows.append(SheetRow(label="reference", pictures=[clip.reference_rgb] * len(steps)))
    if clip.pose_keypoints is not None:
        rows.append(SheetRow(label="pose", pictures=list(draw_poses(clip.pose_keypoints[steps], clip.canvas_hw))))
    if clip.faces_rgb is not None:
        rows.append(SheetRow(label="face", pictures=list(clip.faces_rgb[steps])))
    if clip.mask is not None:
        mask = clip.mask[steps]
        tinted = np.where(mask[..., None], (frames * 0.45 + _MASK_COLOR * 0.55).astype(np.uint8), frames)
        rows.append(SheetRow(label="mask", pictures=list(tinted)))
        rows.append(SheetRow(label="background", pictures=list(blacken(frames, mask))))
    return rows


def _scaled_width(picture: Frames) -> int:
    return max(1, round(picture.shape[1] * _TILE_HEIGHT / picture.shape[0]))


def _draw_header(
    draw: ImageDraw.ImageDraw, clip: Clip, row: Mapping[str, Any], steps: np.ndarray, widths: list[int]
) -> None:
    draw.text((10, 6), clip.clip_id, fill=_INK, font=_font(17))
    quality = ", ".join(f"{name} {value:.2f}" for name, value in row["quality"].items() if value is not None)
    facts = f"{row.get('purpose', '')} · {row['num_frames']} frames, {row['fps']:g} fps · {quality}"
    draw.text((10, 27), facts, fill=_PALE, font=_font(11))
    left = _LABEL_WIDTH
    for step, column in zip(steps, widths):
        seconds = row["timestamps"][step] - row["timestamps"][0]
        draw.text((left + 2, _HEADER_HEIGHT - 16), f"{seconds:.2f} s", fill=_PALE, font=_font(12))
        left += column + _GAP


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
