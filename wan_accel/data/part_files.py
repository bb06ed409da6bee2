"""Parts of a dataset by name: their sidecars, their revisions, which of them count. Torch-free."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_accel.data.store_error import StoreError

_PART_NAME = re.compile(r"(data-\d+)(?:\.r(\d+))?\.arrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What a finished part holds. Its existence is what makes a part count.

    `journal` is the writer's own record of what the rows come from: it counts exactly when they do.
    """

    rows: int
    bytes: int
    xxh64: str
    journal: dict[str, Any] | None = None


def sidecar_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def read_sidecar(part: Path) -> Sidecar:
    """What the sidecar of a finished part says.

    Raises:
        StoreError: it is damaged.
    """
    path = sidecar_path(part)
    try:
        return Sidecar(**json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): copy it again, or remove it with its part and run the command that made it"
        ) from error


def parts(root: Path) -> dict[Path, Sidecar]:
    """Finished parts with their sidecars, in a fixed order.

    Raises:
        StoreError: a sidecar is damaged.
    """
    return {part: read_sidecar(part) for part in finished(root)}


def whole_parts(root: Path) -> dict[Path, Sidecar]:
    """`parts`, each checked to have its size: a part cut between two batches would read short without an error."""
    found = parts(root)
    for part, sidecar in found.items():
        again = f"copy it again, or remove {sidecar_path(part).name} with it and run the command that made it"
        if not part.is_file():
            raise StoreError(f"{part} is missing: {again}")
        if part.stat().st_size != sidecar.bytes:
            raise StoreError(
                f"{part} is damaged: {part.stat().st_size} bytes, its sidecar says {sidecar.bytes}; {again}"
            )
    return found


def finished(root: Path) -> list[Path]:
    """Parts that have a sidecar, each in its newest revision, in a fixed order."""
    newest: dict[tuple[str, str], Path] = {}
    for part in sorted(_with_sidecar(root), key=place_of):
        writer, number, _ = place_of(part)
        newest[writer, number] = part
    return list(newest.values())


def superseded(root: Path) -> list[Path]:
    """Parts that have a sidecar and a newer revision: they do not count any more and can be removed."""
    return sorted(set(_with_sidecar(root)) - set(finished(root)))


def next_revision(part: Path) -> Path:
    """Where a part is written again."""
    _, number, revision = place_of(part)
    return part.with_name(f"{number}.r{revision + 1}.arrow")


def _with_sidecar(root: Path) -> list[Path]:
    return [path.with_name(path.name.removesuffix(".json")) for path in root.glob("parts/*/data-*.arrow.json")]


def place_of(part: Path) -> tuple[str, str, int]:
    """A part's writer, its number, and how often it was written again."""
    match = _PART_NAME.fullmatch(part.name)
    number, revision = match.groups() if match is not None else (part.name, None)
    return part.parent.name, number, int(revision or 0)


def unfinished(folder: Path) -> list[Path]:
    """What killed writers left in a writer's folder: temporaries, and parts without a sidecar, which never counted."""
    parts = [part for part in folder.glob("data-*.arrow") if not sidecar_path(part).is_file()]
    return [*folder.glob("*.tmp"), *parts]


def remove_unfinished(root: Path, writers: Iterable[str]) -> None:
    """Remove what writers that are gone left half-written; their finished parts stay."""
    for writer in writers:
        folder = root / "parts" / writer
        for path in unfinished(folder):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # holds finished parts
            folder.rmdir()
