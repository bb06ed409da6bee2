"""What a run is given: videos, folders of videos, manifests, here or behind a URL."""

import csv
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from wan_accel.listing import first_few

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_MANIFEST_ENDINGS = (".csv", ".jsonl", ".parquet")
_COLUMNS = (
    "path", "caption", "reference", "start_seconds", "end_seconds", "edited_template", "edited_reference",
)  # fmt: skip
_SHOWN_PROBLEMS = 10
_ATTEMPTS, _PAUSE_SECONDS = 3, 2.0


class InputError(ValueError):
    """An input that cannot be used: which, why, what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A video, or an interval of one, in seconds of its own time.

    path: a local path or a URL that fsspec knows. What is None was not said. edited_template, edited_reference: the
    video's person and the reference's in a standard pose, for two-step retargeting.
    """

    path: str
    caption: str | None = None
    reference: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    edited_template: str | None = None
    edited_reference: str | None = None

    @property
    def key(self) -> str:
        """What this work is called in journals: the absolute path or URL, with the interval if there is one."""
        # Not resolve(): it asks the file system about every folder of every path.
        place = self.path if is_remote(self.path) else os.path.abspath(self.path)
        if self.start_seconds is None and self.end_seconds is None:
            return place
        ends = ["" if end is None else f"{end:g}" for end in (self.start_seconds, self.end_seconds)]
        return f"{place}#t={','.join(ends)}"


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """List the videos of files, folders (to the bottom) and manifests, in order, each once.

    A caption that is not in a manifest is read from the .txt beside a local video when it is worked on (`caption_of`).

    Raises:
        InputError: an input does not exist, a folder holds no videos, or a manifest has problems (all at once).
    """
    found: dict[str, Source] = {}
    for given in inputs:
        for source in _sources(str(given)):
            found.setdefault(source.key, source)
    return list(found.values())


def _sources(given: str) -> Iterator[Source]:
    if given.lower().endswith(_MANIFEST_ENDINGS):
        yield from read_manifest(given)
    elif is_remote(given):
        yield from _remote_videos(given)
    elif Path(given).is_dir():
        inside = sorted(p for p in Path(given).rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        if not inside:
            raise InputError(f"{given} holds no videos ({', '.join(VIDEO_ENDINGS)})")
        yield from (Source(path=str(path)) for path in inside)
    elif Path(given).is_file():
        yield Source(path=given)
    else:
        raise InputError(f"{given}: no such file or folder")


def _remote_videos(url: str) -> Iterator[Source]:
    if url.lower().endswith(VIDEO_ENDINGS):
        yield Source(path=url)
        return
    filesystem, place = _filesystem(url)
    scheme = url.split("://", 1)[0]
    try:
        listed = sorted(filesystem.find(place))
    except OSError as error:
        raise InputError(f"{url}: cannot be listed ({error})") from error
    inside = [path for path in listed if path.lower().endswith(VIDEO_ENDINGS)]
    if not inside:
        raise InputError(f"{url} holds no videos ({', '.join(VIDEO_ENDINGS)})")
    yield from (Source(path=f"{scheme}://{path.removeprefix(f'{scheme}://')}") for path in inside)


def read_manifest(path: str) -> list[Source]:
    """Read a csv, jsonl or parquet file with `path` and the other fields of `Source`, as they are there.

    Relative paths start at the manifest's folder. Empty cells and NaN were not said. A video that does not exist is
    found out when it is worked on.

    Raises:
        InputError: it cannot be read, or rows are wrong; the first 10 problems with their rows, and how many there are.
    """
    rows = _rows(path)
    problems = [] if rows else [f"{path} has no rows"]
    if rows and (unknown := sorted({name for row in rows[:1000] for name in row} - set(_COLUMNS))):
        problems.append(f"unknown columns {', '.join(map(str, unknown))}: use {', '.join(_COLUMNS)}")
    sources: dict[str, Source] = {}
    for number, row in enumerate(rows, start=1):
        try:
            source = _source(row, path)
            if source.key in sources:
                raise ValueError(f"{source.path} is there twice with the same interval")
            sources[source.key] = source
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise InputError(f"{path}: {first_few(problems, _SHOWN_PROBLEMS, separator='; ')}")
    return list(sources.values())


def _rows(path: str) -> list[dict[str, Any]]:
    try:
        if path.lower().endswith(".parquet"):
            import pyarrow.parquet

            with _open(path, "rb") as file:
                return list(pyarrow.parquet.read_table(file).to_pylist())
        with _open(path, "r", encoding="utf-8-sig", newline="") as file:
            if path.lower().endswith(".csv"):
                return list(csv.DictReader(file))
            return [_object(line, number) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: the manifest cannot be read ({error})") from error


def _object(line: str, number: int) -> dict[str, Any]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"line {number} is no JSON object")
    return content


def _source(row: dict[str, Any], manifest: str) -> Source:
    said = {name: value for name, value in row.items() if name in _COLUMNS and not _is_empty(value)}
    if "path" not in said:
        raise ValueError("no path")
    values: dict[str, Any] = {"path": _beside(manifest, str(said["path"]))}
    for name in ("reference", "edited_template", "edited_reference"):
        if name in said:
            values[name] = _beside(manifest, str(said[name]))
    if "caption" in said:
        values["caption"] = str(said["caption"])
    for name in ("start_seconds", "end_seconds"):
        if name in said:
            values[name] = _seconds(name, said[name])
    start, end = values.get("start_seconds", 0.0), values.get("end_seconds", math.inf)
    if end <= start:
        raise ValueError(f"end_seconds {end:g} is not after start_seconds {start:g}")
    return Source(**values)


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {value!r} is not a number of seconds") from None
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} {value!r} is not a number of seconds from 0")
    return seconds


def _beside(manifest: str, path: str) -> str:
    """A path as it is meant: relative ones start at the manifest's folder."""
    if is_remote(path) or Path(path).is_absolute():
        return path
    if is_remote(manifest):
        return f"{manifest.rsplit('/', 1)[0]}/{path}"
    return str(Path(manifest).parent / path)


def caption_of(source: Source) -> str | None:
    """The caption that a manifest gave, else the text of the .txt beside a local video, else None.

    Raises InputError for a text file that is not UTF-8.
    """
    if source.caption is not None or is_remote(source.path):
        return source.caption
    sidecar = Path(source.path).with_suffix(".txt")
    if not sidecar.is_file():
        return None
    try:
        return sidecar.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{sidecar}: the caption is not UTF-8 ({error})") from error


@contextmanager
def local_file(source_path: str, scratch: Path) -> Iterator[Path]:
    """Give a path on this machine: the file itself, or a copy of a remote one that is removed afterwards.

    Raises OSError where the copy fails three times, or is shorter than the original.
    """
    if not is_remote(source_path):
        yield Path(source_path)
        return
    filesystem, place = _filesystem(source_path)
    folder = scratch / uuid4().hex
    folder.mkdir(parents=True)
    try:
        target = folder / Path(place).name
        _repeat(lambda: _copy(filesystem, place, target), source_path)
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(filesystem: Any, place: str, target: Path) -> None:
    filesystem.get_file(place, str(target))
    expected = filesystem.size(place)
    if expected is not None and target.stat().st_size != expected:
        raise OSError(f"{target.stat().st_size} of {expected} bytes arrived")


def _repeat(action: Callable[[], None], what: str) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            action()
        except FileNotFoundError:
            raise FileNotFoundError(f"{what}: no such file") from None
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise OSError(f"{what}: cannot be copied, tried {attempt} times ({error})") from error
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def is_remote(path: str) -> bool:
    """Tell a URL from a path on this machine."""
    return "://" in path


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: {error}; install the fsspec package for it, or copy the files to a local disk"
        ) from None
    return filesystem, str(place)


def _open(path: str, mode: str, **options: Any) -> Any:
    if not is_remote(path):
        return Path(path).open(mode, **options)
    import fsspec

    return fsspec.open(path, mode, **options).open()
