"""A folder of files for each chosen clip of a dataset: checked before, resumed after an interruption."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from preprocessing.selection import Selection, select
from preprocessing.wan_files import needed_columns
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA
from wan_accel.listing import first_few

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EXPORT_SCHEMA = "wan-accel/export@1"
_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """How many clips an export wrote, and how many were there from before."""

    written: int
    kept: int


class ChosenClips:
    """The chosen rows of a clips dataset. `names`: their clip ids; `identity`: what tells the dataset from another."""

    def __init__(self, dataset: Path, selection: Selection) -> None:
        """Raises StoreError or SchemaError where it is no clips dataset, ValueError where nothing is chosen."""
        self.clips: Dataset = store.load(dataset, CLIPS_SCHEMA)
        self.is_animate = "pose_keypoints" in self.clips.column_names
        self.rows = select(dataset, selection)
        self.names: list[str] = self.column("clip_id")
        run_file = dataset / store.RUN_FILE
        self.identity: str = json.loads(run_file.read_text())["settings_hash"] if run_file.is_file() else ""

    def values(self, name: str) -> "pa.ChunkedArray":
        """A column of numbers, texts or small structs."""
        return self.clips.data.column(name).take(self.rows)

    def column(self, name: str) -> list[Any]:
        """The same as Python values."""
        return list(self.values(name).to_pylist())

    def check_columns(self) -> None:
        """Raise ValueError where clips lack what the files of their modes are made from; all problems at once."""
        if not self.is_animate:
            raise ValueError(
                "these clips were cut without looking for people (wan-preprocess clips), so there is no pose to draw: "
                "use --layout diffsynth, parquet or hub"
            )
        absent: dict[str, list[str]] = {}
        valid = {name: self.clips.data.column(name).is_valid().to_pylist() for name in _drawn_columns()}
        for row, name, modes in zip(self.rows, self.names, self.column("modes")):
            needed = {column for columns in needed_columns(modes or []).values() for column in columns}
            for column in [c for c in sorted(needed) if not valid[c][row]] or ([] if needed else ["modes"]):
                absent.setdefault(column, []).append(name)
        if absent:
            problems = "; ".join(f"no {column} in {some(names)}" for column, names in absent.items())
            raise ValueError(f"{problems}: leave them out with --where or --clip")

    def write_folders(self, output: Path, files: Callable[[Mapping[str, Any]], Mapping[str, bytes]]) -> Exported:
        """Write a folder a clip, named as the clip.

        It is written under another name and renamed when whole: a folder that is there is finished, and is kept.
        `files` is given rows whose reference is not decoded: {bytes, path}.
        """
        from datasets import Image

        clips = self.clips.cast_column("reference", Image(decode=False)) if self.is_animate else self.clips
        kept = 0
        for row, name in zip(tqdm(self.rows, "clips", disable=None), self.names):
            folder = output / name
            if folder.is_dir():
                kept += 1
                continue
            temporary = output / f".{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
            temporary.mkdir()
            for file, content in files(clips[row]).items():
                _write(temporary / file, content)
            temporary.rename(folder)
        return Exported(written=len(self.rows) - kept, kept=kept)


def some(names: Sequence[str]) -> str:
    """The first few of the clips' names, for a message."""
    return f"{'clips' if len(names) > 1 else 'clip'} {first_few(names, _SHOWN)}"


def _drawn_columns() -> set[str]:
    return {column for columns in needed_columns(["replacement"]).values() for column in columns}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
