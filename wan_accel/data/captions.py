"""Captions from a file, laid over those of a dataset without rewriting it. Torch-free."""

import csv
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from wan_accel.listing import first_few

logger = logging.getLogger("wan_accel")
_COLUMNS = ("clip_id", "caption")
_ENCODING = "utf-8-sig"  # Excel and PowerShell begin a file with a byte order mark


def caption_id(caption: str) -> str:
    """Name a caption by its xxh64 hash, in hex."""
    return xxhash.xxh64(caption.encode()).hexdigest()


def read_captions(path: Path) -> dict[str, str]:
    """Captions by clip_id: rows {clip_id, caption} of a .jsonl, .csv or .parquet file, or a .json with them or a map.

    Raises:
        ValueError: no such file, another format, a row without both columns, or a clip with two captions.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"data.captions={path} is not a file of captions: give one of {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"data.captions={path} does not exist: give a file with clip_id and caption of each clip")
    try:
        rows = _READERS[path.suffix](path)
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"data.captions={path} cannot be read ({error})") from None
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        clip_id, caption = (row.get(name) for name in _COLUMNS) if isinstance(row, Mapping) else (None, None)
        if not isinstance(clip_id, str) or not isinstance(caption, str):
            raise ValueError(f"data.captions={path}: row {number} has no text clip_id and caption, it is {row!r:.100}")
        if captions.setdefault(clip_id, caption) != caption:
            raise ValueError(f"data.captions={path}: {clip_id} has two captions (row {number}): keep one")
    return captions


def check_clip_ids(captions: Mapping[str, str], clip_ids: Iterable[str], path: str) -> None:
    """Warn of captions of clips that are not there: a misspelt id leaves a clip with its old caption.

    They are no error, since one file may serve several folders, and clips that a filter or a failure keeps out.

    Raises:
        ValueError: no caption is of a clip that is there.
    """
    unknown = sorted(captions.keys() - set(clip_ids))
    if not unknown:
        return
    message = (
        f"data.captions={path} has captions of {len(unknown)} clips that the dataset does not have "
        f"({first_few(unknown, 3)})"
    )
    if len(unknown) == len(captions):
        raise ValueError(f"{message}, and none of a clip that it has: give the file of these clips")
    is_main = os.environ.get("RANK", "0") == "0"  # one rank says it
    logger.log(logging.WARNING if is_main else logging.DEBUG, "%s: are their clip_ids right?", message)


def _read_jsonl(path: Path) -> list[Any]:
    # Not `splitlines`: JSON may have U+2028 and its like inside a caption, where they end no line.
    with path.open(encoding=_ENCODING) as file:
        return [json.loads(line, object_pairs_hook=_once) for line in file if line.strip()]


def _read_json(path: Path) -> list[Any]:
    content = json.loads(path.read_text(encoding=_ENCODING), object_pairs_hook=_once)
    if isinstance(content, Mapping):
        return [dict(zip(_COLUMNS, item)) for item in content.items()]
    if not isinstance(content, list):
        raise ValueError("it holds neither a list of rows nor a map of clip_id to caption")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of two equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice: keep one")
        found[key] = value
    return found


def _read_csv(path: Path) -> list[Any]:
    with path.open(newline="", encoding=_ENCODING) as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=list(_COLUMNS)).to_pylist()


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
