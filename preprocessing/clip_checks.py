"""What a row of the clips dataset must keep to."""

import json
import math
import re
from collections.abc import Iterator

from preprocessing.content_checks import CONTENT_CHECKS, Check, Finding, Row
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, QUALITY

PURPOSES, MODES, REFERENCE_KINDS = ("train", "drive"), ("animation", "replacement"), ("frame", "image")
_SIZE_DIVISOR = 16


def check_clip(row: Row) -> list[Finding]:
    """Return what is wrong with a row as plain values (`pyarrow.RecordBatch.to_pylist`); empty for a sound clip.

    Videos are decoded. Where the row's own numbers are wrong, columns are not compared with them.
    """
    findings = list(_numbers(row))
    checks = _CHECKS if findings else _CHECKS + CONTENT_CHECKS
    return findings + [finding for check in checks for finding in check(row)]


def _numbers(row: Row) -> Iterator[Finding]:
    num_frames = row["num_frames"]
    if num_frames is None or num_frames < 1 or num_frames % 4 != 1:
        yield "num_frames", f"{num_frames} is not 4n + 1"
    divisor = 1 if row.get("purpose") == "drive" else _SIZE_DIVISOR  # not trained on: its canvas is the character's
    for column in ("height", "width"):
        if row[column] is None or row[column] < 1 or row[column] % divisor:
            yield column, f"{row[column]} is not divisible by {_SIZE_DIVISOR}"
    if not _is_finite(row["fps"]) or row["fps"] <= 0:
        yield "fps", f"{row['fps']} is no rate"


def _identity(row: Row) -> Iterator[Finding]:
    if row["schema"] != CLIPS_SCHEMA:
        yield "schema", f"is {row['schema']!r}, expected {CLIPS_SCHEMA!r}"
    if not row["clip_id"]:
        yield "clip_id", "is empty"
    if row["caption"] is None:
        yield "caption", "is null; a clip without one has an empty text"
    source = row["source"]
    if source is None or not re.fullmatch("[0-9a-f]{64}", source["sha256"] or ""):
        yield "source", f"sha256 is {(source or {}).get('sha256')!r}, expected 64 hexadecimal digits"
    elif not _is_finite(source["start_seconds"]) or not _is_finite(source["end_seconds"]):
        yield "source", f"lasts from {source['start_seconds']} to {source['end_seconds']} s"
    elif source["start_seconds"] >= source["end_seconds"]:
        yield "source", f"ends at {source['end_seconds']} s, before it starts at {source['start_seconds']} s"


def _purpose(row: Row) -> Iterator[Finding]:
    if "purpose" not in row:
        return
    if row["purpose"] not in PURPOSES:
        yield "purpose", f"is {row['purpose']!r}, expected {' or '.join(PURPOSES)}"
    modes = row["modes"] or []
    if not modes or len(set(modes)) != len(modes) or not set(modes) <= set(MODES):
        yield "modes", f"are {modes}, expected one or both of {', '.join(MODES)}"
    if "replacement" in modes and row["mask"] is None:
        yield "modes", "has replacement, but the clip has no mask"
    if row["pose_keypoints"] is None:
        yield "pose_keypoints", "is missing"
    if (kind := (row["reference_source"] or {}).get("kind")) not in REFERENCE_KINDS:
        yield "reference_source", f"kind is {kind!r}, expected {' or '.join(REFERENCE_KINDS)}"


def _quality(row: Row) -> Iterator[Finding]:
    for name, value in (row["quality"] or {}).items():
        if name not in QUALITY:
            yield "quality", f"{name!r} is no figure of this version: use {', '.join(QUALITY)}"
        elif value is not None and not math.isfinite(value):
            yield "quality", f"{name} is {value}"


def _provenance(row: Row) -> Iterator[Finding]:
    try:
        content = json.loads(row["provenance"] or "")
    except json.JSONDecodeError as error:
        yield "provenance", f"is no JSON ({error})"
        return
    if not isinstance(content, dict):
        yield "provenance", f"is {type(content).__name__}, expected an object"
    elif "settings" in content and (wanted := store.settings_hash(content["settings"])) != row["settings_hash"]:
        yield "settings_hash", f"is {row['settings_hash']!r}, the settings in provenance have {wanted!r}"


_CHECKS: tuple[Check, ...] = (_identity, _purpose, _quality, _provenance)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
