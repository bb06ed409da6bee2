"""Contact sheet, overlay video and thumbnail of one clip of a dataset."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from preprocessing.clip_checks import check_clip
from preprocessing.contact_sheet import contact_sheet
from preprocessing.overlay import overlay_frames, write_browser_mp4
from wan_accel.data import store
from wan_accel.data.clips import load_clip

SHEETS, OVERLAYS, THUMBNAILS = "sheets", "overlays", "thumbnails"
_THUMBNAIL_SIDE = 320
_LONGEST_NAME = 200  # bytes; file systems allow 255 with the suffix


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaTask:
    """A clip (its part and row in it), and what its files in the folder `output` are called."""

    part: Path
    row: int
    output: Path
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Files of a clip, relative to the report, and the thumbnail's size; `problem`: why there are none."""

    sheet: str = ""
    overlay: str = ""
    thumbnail: str = ""
    thumbnail_wh: tuple[int, int] = (0, 0)
    problem: str | None = None


def make_media(task: MediaTask) -> Media:
    """Write the files of a clip. A clip that is wrong in a way that does not allow it has a problem instead."""
    row = _read_row(task.part, task.row)
    try:
        return _draw(row, task)
    except Exception:  # one wrong clip, whatever is wrong with it, must not cost the report
        findings = check_clip(row)
        if not findings:
            raise
        wrong = "; ".join(f"{column} {message}" for column, message in findings)
        return Media(problem=f"clip {row['clip_id']}: {wrong}")


def _draw(row: dict[str, Any], task: MediaTask) -> Media:
    clip = load_clip(row)
    sheet, overlay = f"{SHEETS}/{task.name}.jpg", f"{OVERLAYS}/{task.name}.mp4"
    thumbnail = f"{THUMBNAILS}/{task.name}.webp"
    frames = overlay_frames(clip, row)
    write_browser_mp4(task.output / overlay, frames, float(row["fps"]))
    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    picture.save(task.output / thumbnail, quality=75)
    contact_sheet(clip, row).save(task.output / sheet, quality=84)
    return Media(sheet=sheet, overlay=overlay, thumbnail=thumbnail, thumbnail_wh=picture.size)


def _read_row(part: Path, number: int) -> dict[str, Any]:
    first = 0
    for batch in store.batches(part):
        if number < first + batch.num_rows:
            return store.plain_row(batch, number - first)
        first += batch.num_rows
    raise store.StoreError(f"{part} has {first} rows, no row {number}: it was changed meanwhile")


def file_name(clip_id: str, taken: Collection[str]) -> str:
    """The clip's id where it is a plain file name of its own, else `clip <number>`: ids are text like any other."""
    is_plain = re.fullmatch(r"\w[\w.\-]*", clip_id) and len(os.fsencode(clip_id)) <= _LONGEST_NAME
    return clip_id if is_plain and clip_id not in taken else f"clip {len(taken)}"
