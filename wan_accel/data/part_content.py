"""What is in a part: its rows, its ids, and whether it is what its sidecar says. Torch-free."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import xxhash

from wan_accel.data.part_files import Sidecar, parts, whole_parts


def batches(part: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of a part, memory-mapped: only what is looked at is read from the disk."""
    with pa.memory_map(str(part)) as source:
        yield from pa.ipc.open_stream(source)


def plain_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    """A row as Python values. Arrays are read below the types of `datasets`, which turn a null into nan."""
    columns = zip(batch.schema.names, batch.columns)
    return {name: getattr(column, "storage", column)[index].as_py() for name, column in columns}


def ids(root: Path, column: str) -> set[str]:
    """Values of a string column over all finished parts: what is done already. Empty for a new folder.

    Raises:
        StoreError: a part is missing or cut short, so that what is done cannot be known.
    """
    return set(each_id(root, column))


def each_id(root: Path, column: str) -> Iterator[str]:
    """Values of a string column over all finished parts, in order, as often as they are there; see `ids`."""
    for part in whole_parts(root):
        for batch in batches(part):
            yield from batch[column].to_pylist()


def verify(root: Path) -> list[str]:
    """Check every part's size, hash and rows; return what is wrong, one line each."""
    problems = {part: part_problem(part, sidecar) for part, sidecar in parts(root).items()}
    return [f"{part}: {problem}" for part, problem in problems.items() if problem is not None]


def part_problem(part: Path, sidecar: Sidecar) -> str | None:
    """Check a part's size, hash and rows against its sidecar; None for a sound part."""
    if not part.is_file():
        return "missing"
    if (size := part.stat().st_size) != sidecar.bytes:
        return f"{size} bytes, expected {sidecar.bytes}"
    with part.open("rb") as file:
        if hash_file(file) != sidecar.xxh64:
            return "content differs from its hash"
    if (rows := sum(batch.num_rows for batch in batches(part))) != sidecar.rows:
        return f"{rows} rows, expected {sidecar.rows}"
    return None


def hash_file(file: IO[bytes]) -> str:
    """Hash a whole open file."""
    digest = xxhash.xxh64()
    file.seek(0)
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()
