"""Rows into parts: appended, finished one by one, safe against kill -9. Torch-free."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from wan_accel.data.files import full_disk, write_json
from wan_accel.data.opened import refresh_state
from wan_accel.data.part_content import hash_file
from wan_accel.data.part_files import Sidecar, sidecar_path, unfinished
from wan_accel.data.store_error import StoreError

if TYPE_CHECKING:
    from datasets import Features

PART_BYTES = 1 << 30
BATCH_BYTES = 32 << 20
BATCH_ROWS = 64


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
        for leftover in unfinished(self.folder):
            leftover.unlink()  # of a writer of this name that was killed

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

    def write_each(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows as they are made; if making one fails or is interrupted, finish the part of those before it."""
        made = iter(rows)
        while True:
            try:
                row = next(made, None)
            except BaseException:
                self.flush()
                raise
            if row is None:
                return
            self.write(row)

    def _write_batch(self) -> None:
        if not self._rows:
            return
        with full_disk(self._part):
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
        with full_disk(self._part):
            self._open()
            self._stream.write_table(table)
        self._written_rows += len(table)
        if self._file is not None and self._file.tell() >= self.part_bytes:
            self.flush()

    def _open(self) -> IO[bytes]:
        """The part's file; opened with the first rows, or for a part without any."""
        if self._file is None:
            from datasets.arrow_writer import ArrowWriter

            temporary = self._part.with_name(self._part.name + ".tmp")
            with full_disk(self._part):
                temporary.unlink(missing_ok=True)
                self._file = temporary.open("x+b")  # a file of its own: what another run has open stays as it is
                self._stream = ArrowWriter(stream=pa.PythonFile(self._file, mode="w"), features=self.features)
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
        with full_disk(self._part):
            self._stream.finalize(close_stream=False)
            file.flush()
            os.fsync(file.fileno())
        sidecar = Sidecar(rows=self._written_rows, bytes=file.tell(), xxh64=hash_file(file), journal=journal)
        self._check_alone()
        temporary.rename(self._part)
        file.close()
        content = {key: value for key, value in asdict(sidecar).items() if value is not None}
        write_json(sidecar_path(self._part), content)
        self._number += 1
        self._file = self._stream = None
        self._written_rows = 0
        self._publish()

    def _check_alone(self) -> None:
        """Refuse to finish a part where another run writes under this name too: one would replace the other's rows."""
        if not self._has_file or sidecar_path(self._part).exists():
            raise StoreError(
                f"{self._part} is written by another run at the same time: this one stops, and its rows since its last "
                "finished part are lost; run one at a time"
            )

    @property
    def _has_file(self) -> bool:
        """Say whether the unfinished part at its path is this writer's."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name))
        except FileNotFoundError:
            return False

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
            if self._has_file:
                Path(self._file.name).unlink(missing_ok=True)
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                self._file.close()
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
