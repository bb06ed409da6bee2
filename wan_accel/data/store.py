"""The on-disk protocol of both datasets: parts with sidecars, many writers, safe against kill -9. Torch-free.

<root>/wan_accel_run.json            schema and settings of the run that owns the folder
<root>/parts/<writer>/data-00000.arrow       an Arrow stream, written as .arrow.tmp and renamed when on disk
<root>/parts/<writer>/data-00000.arrow.json  its sidecar: rows, bytes, xxh64
<root>/parts/<writer>/data-00000.r1.arrow    the part written again (`revisions`): it takes the part's place when whole
<root>/state.json, dataset_info.json  made from the sidecars, so that `datasets.load_from_disk(root)` works
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import xxhash

from wan_accel.data.schema import check_schema

if TYPE_CHECKING:
    from datasets import Dataset, Features

RUN_FILE = "wan_accel_run.json"
PART_BYTES = 1 << 30
BATCH_BYTES = 32 << 20
BATCH_ROWS = 64
_PART_NAME = re.compile(r"(data-\d+)(?:\.r(\d+))?\.arrow")


class StoreError(ValueError):
    """A dataset folder that cannot be used: what, where, what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What a finished part holds. Its existence is what makes a part count.

    `journal` is the writer's own record of what the rows come from: it counts exactly when they do.
    """

    rows: int
    bytes: int
    xxh64: str
    journal: dict[str, Any] | None = None


def claim_output(root: Path, *, schema: str, settings: dict[str, Any]) -> None:
    """Make `root` the output of a run with these settings, or check that it already is.

    Raises:
        StoreError: the folder holds foreign files, or a run with another schema or other settings; the message
            names the differences. Nothing is changed.
    """
    path = root / RUN_FILE
    settings = json.loads(json.dumps(settings))  # as they read back: a tuple is a list
    wanted = {"schema": schema, "settings": settings, "settings_hash": settings_hash(settings)}
    if path.is_file():
        found = json.loads(path.read_text())
        check_schema(found.get("schema"), schema, str(root))
        differences = [
            f"{key}: {found['settings'].get(key)!r} there, {settings.get(key)!r} now"
            for key in sorted({*found["settings"], *settings})
            if found["settings"].get(key) != settings.get(key)
        ]
        if differences:
            raise StoreError(
                f"{root} was made with other settings ({'; '.join(differences)}): choose another output folder, or "
                "remove it"
            )
        return
    # The run file itself, or its temporary, is another rank claiming at this moment, or a claim that was killed.
    if root.is_dir() and any(not path.name.startswith(RUN_FILE) for path in root.iterdir()):
        raise StoreError(f"{root} is not empty and was not made by wan-accel: choose another output folder")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash settings independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once; each write has its own temporary file, also across machines."""
    _replace(path, json.dumps(content, indent=1))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file at once."""
    _replace(path, "".join(f"{line}\n" for line in lines))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with _full_disk(path), temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" (and its relatives) into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"no space left for {path} ({error.strerror}): free some and run the same command again; "
                "finished parts are kept"
            ) from error
        raise


class PartWriter:
    """Appends rows to a dataset; each writer of a run has its own name and never touches another's files.

    Rows are safe once their part is renamed: at `flush`, at `close`, and when a part reaches its size. A writer
    that is killed loses at most the part being written.

    Args:
        root: the dataset folder, claimed before.
        writer: a name unique among the running writers, e.g. `rank0`.
        features: columns.
        part_bytes: size at which a part is finished.
        batch_bytes: size of a record batch; every batch costs each reader that maps all of them 58 KB.

    Raises:
        StoreError: the disk is full, or a row has an unknown column.
    """

    def __init__(
        self,
        root: Path,
        *,
        writer: str,
        features: "Features",
        part_bytes: int = PART_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self.root = root
        self.folder = root / "parts" / writer
        self.folder.mkdir(parents=True, exist_ok=True)
        self.features = features
        self.part_bytes = part_bytes
        self.batch_bytes = batch_bytes
        self._tidy()
        numbers = [int(path.name[5:10]) for path in self.folder.glob("data-*.arrow")]
        self._number = max(numbers, default=-1) + 1
        self._rows: list[dict[str, Any]] = []
        self._buffered = 0
        self._file: IO[bytes] | None = None
        self._stream: Any = None
        self._written_rows = 0

    def _tidy(self) -> None:
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()  # of a writer of this name that was killed
        for part in self.folder.glob("data-*.arrow"):
            if not _sidecar_path(part).is_file():
                part.unlink()  # renamed, but killed before its sidecar: it never counted

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abandon()

    @property
    def _part(self) -> Path:
        return self.folder / f"data-{self._number:05}.arrow"

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when its part is finished. Columns that it lacks are null.

        So are arrays that are nan: `datasets` reads a null array of unknown length back as that.
        """
        if unknown := sorted(row.keys() - self.features.keys()):
            raise StoreError(f"a row has columns that {self.root} does not have: {', '.join(unknown)}")
        values = {name: _or_null(row.get(name), kind) for name, kind in self.features.items()}
        encoded = self.features.encode_example(values)
        self._rows.append(encoded)
        self._buffered += _size(encoded)
        if self._buffered >= self.batch_bytes or len(self._rows) >= BATCH_ROWS:
            self._write_batch()
            if self._file is not None and self._file.tell() >= self.part_bytes:
                self.flush()

    def _write_batch(self) -> None:
        if not self._rows:
            return
        with _full_disk(self._part):
            self._open()
            for row in self._rows:
                self._stream.write(row)
            self._stream.write_examples_on_file()
        self._written_rows += len(self._rows)
        self._rows, self._buffered = [], 0

    def write_table(self, table: pa.Table) -> None:
        """Append rows that have the dataset's columns already, bit by bit; see `write`.

        Raises StoreError for other columns.
        """
        if table.column_names != list(self.features):
            raise StoreError(f"rows for {self.root} have other columns than it: {', '.join(table.column_names)}")
        self._write_batch()
        with _full_disk(self._part):
            self._open()
            self._stream.write_table(table)
        self._written_rows += len(table)
        if self._file is not None and self._file.tell() >= self.part_bytes:
            self.flush()

    def _open(self) -> IO[bytes]:
        """The part's file; opened with the first rows, or for a part without any."""
        if self._file is None:
            from datasets.arrow_writer import ArrowWriter

            with _full_disk(self._part):
                self._file = self._part.with_name(self._part.name + ".tmp").open("wb")
                self._stream = ArrowWriter(stream=pa.PythonFile(self._file), features=self.features)
        return self._file

    @property
    def unfinished_bytes(self) -> int:
        """Bytes written and buffered since the last part was finished."""
        return self._buffered + (self._file.tell() if self._file is not None else 0)

    def flush(self, journal: dict[str, Any] | None = None) -> None:
        """Finish the part: every row written so far is safe, and visible to `load_from_disk`, when this returns.

        `journal` goes into the part's sidecar; with one, a part without rows is written too.
        """
        self._write_batch()
        if self._file is None and journal is None:
            return
        file = self._open()
        temporary = Path(file.name)
        with _full_disk(self._part):
            self._stream.finalize(close_stream=False)
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sidecar = Sidecar(
            rows=self._written_rows, bytes=temporary.stat().st_size, xxh64=_hash_file(temporary), journal=journal
        )
        temporary.rename(self._part)
        content = {key: value for key, value in asdict(sidecar).items() if value is not None}
        write_json(_sidecar_path(self._part), content)
        self._number += 1
        self._file = self._stream = None
        self._written_rows = 0
        self._publish()

    def _publish(self) -> None:
        refresh_state(self.root, self.features)

    def close(self) -> None:
        """Finish the part. Without new rows, list what an earlier writer finished before it was killed."""
        self.flush()
        self._publish()

    def abandon(self) -> None:
        """Drop the unfinished part, keep the finished ones."""
        self._rows, self._buffered, self._written_rows = [], 0, 0
        if self._file is not None:
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = self._stream = None


def _or_null(value: Any, kind: Any) -> Any:
    """A column's value; None for a nan that stands for an array."""
    is_nan = isinstance(value, float) and value != value
    return None if is_nan and type(kind).__name__.startswith("Array") else value


def _size(value: Any) -> int:
    """Bytes of the large values of an encoded row."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return 8 * len(value) if value and isinstance(value[0], (int, float)) else sum(map(_size, value))
    if isinstance(value, (bytes, str)):
        return len(value)
    return getattr(value, "nbytes", 8)


def _sidecar_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def finished(root: Path) -> list[Path]:
    """Parts that have a sidecar, each in its newest revision, in a fixed order."""
    newest: dict[tuple[str, str], Path] = {}
    for part in sorted(_with_sidecar(root), key=_place):
        writer, number, _ = _place(part)
        newest[writer, number] = part
    return list(newest.values())


def superseded(root: Path) -> list[Path]:
    """Parts that have a sidecar and a newer revision: they do not count any more and can be removed."""
    return sorted(set(_with_sidecar(root)) - set(finished(root)))


def next_revision(part: Path) -> Path:
    """Where a part is written again."""
    _, number, revision = _place(part)
    return part.with_name(f"{number}.r{revision + 1}.arrow")


def _with_sidecar(root: Path) -> list[Path]:
    return [path.with_name(path.name.removesuffix(".json")) for path in root.glob("parts/*/data-*.arrow.json")]


def _place(part: Path) -> tuple[str, str, int]:
    """A part's writer, its number, and how often it was written again."""
    match = _PART_NAME.fullmatch(part.name)
    number, revision = match.groups() if match is not None else (part.name, None)
    return part.parent.name, number, int(revision or 0)


def parts(root: Path) -> dict[Path, Sidecar]:
    """Finished parts with their sidecars, in a fixed order.

    Raises:
        StoreError: a sidecar is damaged.
    """
    return {part: read_sidecar(part) for part in finished(root)}


def read_sidecar(part: Path) -> Sidecar:
    """What the sidecar of a finished part says.

    Raises:
        StoreError: it is damaged.
    """
    path = _sidecar_path(part)
    try:
        return Sidecar(**json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): copy it again, or remove it with its part and run the command that made it"
        ) from error


def remove_unfinished(root: Path, writers: Iterable[str]) -> None:
    """Remove what writers that are gone left half-written; their finished parts stay."""
    for writer in writers:
        folder = root / "parts" / writer
        for path in [*folder.glob("*.tmp"), *folder.glob("data-*.arrow")]:
            if path.suffix == ".tmp" or not _sidecar_path(path).is_file():
                path.unlink(missing_ok=True)
        with suppress(OSError):  # holds finished parts
            folder.rmdir()


def whole_parts(root: Path) -> dict[Path, Sidecar]:
    """`parts`, each checked to have its size: a part cut between two batches would read short without an error."""
    found = parts(root)
    for part, sidecar in found.items():
        again = f"copy it again, or remove {_sidecar_path(part).name} with it and run the command that made it"
        if not part.is_file():
            raise StoreError(f"{part} is missing: {again}")
        if part.stat().st_size != sidecar.bytes:
            raise StoreError(
                f"{part} is damaged: {part.stat().st_size} bytes, its sidecar says {sidecar.bytes}; {again}"
            )
    return found


def refresh_state(root: Path, features: "Features") -> None:
    """Write state.json and dataset_info.json from the sidecars, each replaced at once."""
    from datasets import DatasetInfo

    info = {key: value for key, value in asdict(DatasetInfo(features=features)).items() if value is not None}
    listed: list[dict[str, str]] = []
    # Until nothing changed meanwhile: of two writers finishing at once, the slower may have seen fewer parts.
    while (files := [{"filename": str(part.relative_to(root))} for part in finished(root)]) != listed:
        write_json(root / "dataset_info.json", info)
        state: dict[str, Any] = {
            "_data_files": files, "_fingerprint": settings_hash({"files": files}), "_format_columns": None,
            "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
        }  # fmt: skip
        write_json(root / "state.json", state)
        listed = files


def open_parts(root: Path, schema: str) -> dict[Path, Sidecar]:
    """The parts of a dataset that can be read as a whole, in the order of its rows, with their sidecars.

    Raises:
        StoreError: it does not exist, is empty, remote, or a part is missing or cut short.
        SchemaError: another schema.
    """
    if "://" in str(root):
        raise StoreError(f"{root} is remote: copy it to a local disk first, e.g. `aws s3 sync {root} /data/...`")
    root = Path(root)
    if not (root / "state.json").is_file():
        raise StoreError(f"{root} is not a dataset of wan-accel (no state.json): give the folder that a run wrote")
    found = whole_parts(root)
    listed = [root / entry["filename"] for entry in json.loads((root / "state.json").read_text())["_data_files"]]
    places = {_place(part)[:2] for part in found}
    for part in listed:
        if part not in found and _place(part)[:2] in places:
            raise StoreError(f"{part} is being written again: wait for the command that does it, or run it again")
        if part not in found:
            raise StoreError(f"{part} has no sidecar: copy it again, or run the command that made it again")
    if (root / RUN_FILE).is_file():
        check_schema(json.loads((root / RUN_FILE).read_text()).get("schema"), schema, str(root))
    return {part: found[part] for part in listed}


def load(root: Path, schema: str, *, columns: list[str] | None = None) -> "Dataset":
    """Open a dataset and check it: `datasets.load_from_disk` plus schema and row counts.

    Raises:
        StoreError, SchemaError: as `open_parts`; rows of another schema.
    """
    from datasets import load_from_disk

    expected = sum(sidecar.rows for sidecar in open_parts(root, schema).values())
    dataset = load_from_disk(str(root))
    if len(dataset) != expected:
        raise StoreError(f"{root} loads {len(dataset)} rows, its sidecars say {expected}: verify it to find the part")
    for value in dataset.unique("schema"):
        check_schema(value, schema, str(root))
    return dataset.select_columns(columns) if columns is not None else dataset


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


def batches(part: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of a part, memory-mapped: only what is looked at is read from the disk."""
    with pa.memory_map(str(part)) as source:
        yield from pa.ipc.open_stream(source)


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
    if _hash_file(part) != sidecar.xxh64:
        return "content differs from its hash"
    if (rows := sum(batch.num_rows for batch in batches(part))) != sidecar.rows:
        return f"{rows} rows, expected {sidecar.rows}"
    return None


def plain_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    """A row as Python values. Arrays are read below the types of `datasets`, which turn a null into nan."""
    columns = zip(batch.schema.names, batch.columns)
    return {name: getattr(column, "storage", column)[index].as_py() for name, column in columns}
