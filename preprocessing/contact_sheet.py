"""Contact sheets: one picture a clip that shows whether its parts belong together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from preprocessing.figures import FIGURES
from preprocessing.masks import blacken
from preprocessing.overlay import MASK_COLOR
from preprocessing.skeleton import draw_poses
from preprocessing.types import Frames
from wan_accel.data.clips import Clip
from wan_accel.sheet_text import INK, PALE, PAPER, font, shortened

NUM_COLUMNS = 6
_TILE_HEIGHT = 224
_GAP, _LABEL_WIDTH, _HEADER_HEIGHT = 6, 112, 106


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SheetRow:
    """A labelled row of pictures, one a time step."""

    label: str
    pictures: list[Frames]


def contact_sheet(clip: Clip, row: Mapping[str, Any]) -> Image.Image:
    """Lay a clip out: frame, reference, pose, face, mask and background over time."""
    steps = np.linspace(0, len(clip.frames_rgb) - 1, NUM_COLUMNS).round().astype(int)
    rows = sheet_rows(clip, steps)
    # A column is as wide as a frame; square faces shrink to it instead of tearing the frames apart.
    column = max(round(p.shape[1] * _TILE_HEIGHT / p.shape[0]) for r in rows if r.label != "face" for p in r.pictures)
    tiles = [[_fit(picture, column) for picture in sheet_row.pictures] for sheet_row in rows]
    heights = [max(tile.height for tile in line) for line in tiles]
    size = _LABEL_WIDTH + len(steps) * (column + _GAP), _HEADER_HEIGHT + sum(heights) + len(rows) * _GAP
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, clip, row, steps, column)
    top = _HEADER_HEIGHT
    for sheet_row, line, height in zip(rows, tiles, heights):
        draw.text((10, top + height // 2 - 8), sheet_row.label, fill=INK, font=font(15))
        for number, tile in enumerate(line):
            sheet.paste(tile, (_LABEL_WIDTH + number * (column + _GAP) + (column - tile.width) // 2, top))
        top += height + _GAP
    return sheet


def _fit(picture: Frames, width: int) -> Image.Image:
    """Scale to the tile's height, or to `width` where that would be wider."""
    scale = min(_TILE_HEIGHT / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)


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
        tinted = np.where(mask[..., None], (frames * 0.45 + np.array(MASK_COLOR) * 0.55).astype(np.uint8), frames)
        rows.append(SheetRow(label="mask", pictures=list(tinted)))
        rows.append(SheetRow(label="background", pictures=list(blacken(frames, mask))))
    return rows


def _draw_header(draw: ImageDraw.ImageDraw, clip: Clip, row: Mapping[str, Any], steps: np.ndarray, column: int) -> None:
    width = _LABEL_WIDTH + len(steps) * (column + _GAP) - 20
    picture = f"{row['width']}x{row['height']}"
    facts = [row.get("purpose"), f"{row['num_frames']} frames", picture, f"{row['fps']:g} fps"]
    quality = [f"{FIGURES[name].label} {value:{FIGURES[name].format}}" for name, value in _known(row)]
    lines = (
        (clip.clip_id, INK, 17),
        (f"“{row['caption']}”" if row["caption"] else "no caption", INK, 14),
        (" · ".join(str(fact) for fact in facts if fact), PALE, 12),
        (" · ".join(quality), PALE, 12),
    )
    top = 6
    for text, color, size in lines:
        draw.text((10, top), shortened(text, width, size), fill=color, font=font(size))
        top += size + 6
    for number, step in enumerate(steps):
        seconds = row["timestamps"][step] - row["timestamps"][0]
        left = _LABEL_WIDTH + number * (column + _GAP)
        draw.text((left + 2, _HEADER_HEIGHT - 16), f"{seconds:.2f} s", fill=PALE, font=font(12))


def _known(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The figures that the clip has and that this version knows."""
    quality = row.get("quality") or {}
    return [(name, quality[name]) for name in FIGURES if quality.get(name) is not None]
