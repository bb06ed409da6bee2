"""Check a clips dataset: every part against its hash, every clip by decoding it."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import CLIPS_SCHEMA


def verify_clips(dataset: Path) -> list[str]:
    """Return what is wrong, one line each; an empty list means that the dataset is sound.

    Raises ValueError where it cannot be opened at all.
    """
    problems = store.verify(dataset)
    if problems:
        return problems  # rows of a damaged part cannot be read one by one
    clips = store.load(dataset, CLIPS_SCHEMA)
    seen: set[str] = set()
    for index in tqdm(range(len(clips)), "clips", disable=None):
        row = clips[index]
        if row["clip_id"] in seen:
            problems.append(f"clip {row['clip_id']} is there twice")
        seen.add(row["clip_id"])
        try:
            load_clip(row)
        except ValueError as error:
            problems.append(str(error))
        problems += _wrong_lengths(row)
    return problems


def _wrong_lengths(row: Mapping[str, Any]) -> list[str]:
    """Columns that `load_clip` does not decode, and that must have a value a frame."""
    lengths = {name: len(row[name]) for name in ("timestamps", "face_boxes") if isinstance(row.get(name), Sized)}
    return [
        f"clip {row['clip_id']}: {name} has {length} frames, its row says {row['num_frames']}"
        for name, length in lengths.items()
        if length != row["num_frames"]
    ]
