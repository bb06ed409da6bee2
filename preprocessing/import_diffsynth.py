"""DiffSynth's dataset metadata (csv, json, jsonl) becomes a manifest for `wan-preprocess clips` and `animate`."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.inputs import VIDEO_ENDINGS, InputError, is_remote
from wan_accel.data.store import write_lines
from wan_accel.listing import first_few

VIDEO, CAPTION = "video", "prompt"
# Arguments of DiffSynth's Wan pipeline that hold a picture of the character, and so columns of its datasets.
REFERENCES = ("reference_image", "animate2_reference_image", "vace_reference_image", "wantodance_reference_image")
_COLUMNS = ("path", "caption", "reference")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """How many videos a manifest lists, and which columns of the metadata it does not use."""

    videos: int
    unused: Sequence[str]


def import_diffsynth(metadata: Path, output: Path, *, base_path: Path | None = None) -> Imported:
    """Write a manifest (csv or jsonl, by its ending) with path, caption and, where there is one, reference.

    Paths become absolute: relative ones start at `base_path`, by default the metadata's folder, as DiffSynth's
    `--dataset_base_path` does.

    Raises:
        InputError: a file cannot be read, `output` exists or has another ending, or rows cannot be used: all problems
            at once (the first 20 written out). Nothing is written then.
    """
    if output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output {output}: a manifest ends in .csv or .jsonl")
    if output.exists():
        raise InputError(f"--output {output} exists: remove it, or choose another name")
    rows = _read(metadata)
    names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
    if VIDEO not in names:
        found = f"columns {', '.join(names)}" if names else "nothing"
        raise InputError(f"{metadata} has no column {VIDEO!r} but {found}: is it the metadata of videos?")
    entries, problems = _entries(rows, base_path or metadata.parent)
    if problems:
        listed = first_few(problems, _SHOWN_PROBLEMS, separator="\n  ")
        raise InputError(f"{metadata}: {len(problems)} problems\n  {listed}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_lines(output, _lines(entries, output.suffix))
    return Imported(videos=len(entries), unused=[n for n in names if n not in (VIDEO, CAPTION, *REFERENCES)])


def _read(metadata: Path) -> list[dict[str, Any]]:
    """The rows, in any of the forms that DiffSynth reads, told apart by the ending as it does."""
    try:
        text = metadata.read_text(encoding="utf-8-sig")
        if metadata.suffix == ".json":
            rows = json.loads(text)
        elif metadata.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{metadata} cannot be read ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{metadata}: expected a list of rows, each with names and values")
    return rows


def _entries(rows: Sequence[dict[str, Any]], base: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The lines of the manifest, and what is wrong with all rows."""
    entries: list[dict[str, str]] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        entry, wrong = _entry(row, base)
        if (path := entry.get("path")) is not None and first.setdefault(path, number) != number:
            wrong.append(f"{path} is in row {first[path]} already; a manifest has a video once, with one caption")
        problems += [f"row {number}: {problem}" for problem in wrong]
        entries.append(entry)
    return entries, problems


def _entry(row: dict[str, Any], base: Path) -> tuple[dict[str, str], list[str]]:
    """A line of the manifest, and what is wrong with the row."""
    entry: dict[str, str] = {}
    problems = ["it has more cells than there are columns"] if None in row else []
    video, caption = row.get(VIDEO), row.get(CAPTION)
    if not isinstance(video, str) or not video:
        problems.append(f"{VIDEO} is {video!r}, expected a path")
    elif not video.lower().endswith(VIDEO_ENDINGS):
        problems.append(f"{VIDEO} {video} is no video file ({', '.join(VIDEO_ENDINGS)})")
    else:
        entry["path"] = _absolute(video, base)
        problems += _absence(VIDEO, entry["path"])
    if caption is not None and not isinstance(caption, str):
        problems.append(f"{CAPTION} is {caption!r}, expected a text")
    elif caption:
        entry["caption"] = caption
    pictures = {name: _picture(row[name]) for name in REFERENCES if row.get(name)}
    if None in pictures.values() or len(set(pictures.values())) > 1:
        said = ", ".join(f"{name} {row[name]!r}" for name in pictures)
        problems.append(f"{said}: expected the path of one picture")
    elif pictures:
        name, picture = next(iter(pictures.items()))
        entry["reference"] = _absolute(str(picture), base)
        problems += _absence(name, entry["reference"])
    return entry, problems


def _picture(value: Any) -> str | None:
    """The one picture that a cell names, also in a list; None for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None


def _absolute(path: str, base: Path) -> str:
    return path if is_remote(path) else str((base / path).absolute())


def _absence(column: str, path: str) -> list[str]:
    return [] if is_remote(path) or Path(path).is_file() else [f"{column} {path}: no such file"]


def _lines(entries: Sequence[dict[str, str]], ending: str) -> list[str]:
    if ending == ".jsonl":
        return [json.dumps(entry, ensure_ascii=False) for entry in entries]
    text = io.StringIO()
    columns = [name for name in _COLUMNS if any(name in entry for entry in entries)]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return [text.getvalue().removesuffix("\n")]
