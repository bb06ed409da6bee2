"""Rows of a dataset, read one at a time: light columns in memory, everything else on the disk until asked for.

`datasets.load_from_disk` keeps every column of every record batch, 58 KB a batch in every process: gigabytes for a
million clips. Here a batch costs the bytes of its light columns and its offset in the file. Torch-free.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wan_accel.data import store
from wan_accel.data.schema import check_schema

_OPEN_PARTS = 64  # files kept open a process
_COPIED_AT_ONCE = 64  # batches: a batch that is held costs its 58 KB


class _Place(NamedTuple):
    """Where a record batch is: a part, bytes from its start, and the number of its first row in the dataset."""

    part: int
    offset: int
    first_row: int


class Rows:
    """The rows of a dataset in the order of `load_from_disk`.

    Args:
        root: the dataset folder.
        schema: what its rows must have in their column `schema`.
        light: columns kept in memory; structs become `source.path`, columns that the dataset lacks are left out.
        listing: the parts to read (`store.listed`), those that are listed now by default.

    Attributes:
        table: the light columns, a row a row.
        parts: its parts, `part_of` the number of each row's.

    Raises:
        StoreError: it does not exist, is remote, or a part is missing or cut short.
        SchemaError: another schema.
    """

    def __init__(
        self, root: Path, schema: str, *, light: Sequence[str], listing: Sequence[str] | None = None
    ) -> None:
        self.root = Path(root)
        opened = store.open_parts(self.root, schema, listing)
        self.parts = list(opened)
        self._places: list[_Place] = []
        tables: list[pa.Table] = []
        counts: list[int] = []
        for number, (part, sidecar) in enumerate(opened.items()):
            tables.append(self._scan(number, ["schema", *light], first_row=sum(counts)))
            counts.append(len(tables[-1]))
            if counts[-1] != sidecar.rows:
                raise store.StoreError(f"{part} has {counts[-1]} rows, its sidecar says {sidecar.rows}: copy it again")
        table = pa.concat_tables(tables).combine_chunks() if tables else pa.table({"schema": pa.array([], pa.string())})
        for value in table["schema"].unique().to_pylist():
            check_schema(value, schema, str(root))
        self.table = table.drop_columns(["schema"])
        self.part_of = np.repeat(np.arange(len(counts)), counts)
        self._first_rows = np.array([place.first_row for place in self._places], dtype=np.int64)
        self._maps: OrderedDict[int, tuple[pa.MemoryMappedFile, pa.Schema]] = OrderedDict()

    def _scan(self, number: int, light: Sequence[str], *, first_row: int) -> pa.Table:
        """Note where a part's batches are, and copy their light columns."""
        with pa.memory_map(str(self.parts[number])) as source:
            stream = pa.ipc.open_stream(source)
            names = [name for name in light if name in stream.schema.names]
            fields = pa.schema([stream.schema.field(name) for name in names])
            tables = [_flat(pa.Table.from_batches([], fields))]
            batches: list[pa.RecordBatch] = []
            for offset, batch in _with_offsets(source, stream):
                self._places.append(_Place(number, offset, first_row))
                first_row += batch.num_rows
                batches.append(batch.select(names))
                if len(batches) == _COPIED_AT_ONCE:
                    tables.append(_flat(pa.Table.from_batches(batches, fields)))
                    batches = []
            return pa.concat_tables([*tables, _flat(pa.Table.from_batches(batches, fields))])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> "Row":
        """A row whose columns are read when they are asked for."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return Row(self._batch(number), index - self._places[number].first_row)

    def _batch(self, number: int) -> pa.RecordBatch:
        """A record batch of the mapped file: its bytes are read where they are touched."""
        place = self._places[number]
        source, schema = self._open(place.part)
        source.seek(place.offset)
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)

    def _open(self, number: int) -> tuple[pa.MemoryMappedFile, pa.Schema]:
        if number not in self._maps:
            part = self.parts[number]
            try:
                source = pa.memory_map(str(part))
            except FileNotFoundError:
                raise store.StoreError(
                    f"{part} is gone: {self.root} was written again while it was read; start again"
                ) from None
            self._maps[number] = source, pa.ipc.open_stream(source).schema
            if len(self._maps) > _OPEN_PARTS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}  # maps cannot be sent to a worker; it opens its own


class Row(Mapping[str, Any]):
    """A row's columns as Python values, each read when it is asked for."""

    def __init__(self, batch: pa.RecordBatch, index: int) -> None:
        self._batch = batch
        self._index = index

    def __getitem__(self, name: str) -> Any:
        position = self._batch.schema.get_field_index(name)
        if position < 0:
            raise KeyError(name)
        return self._scalar(position).as_py()

    def item(self, name: str, number: int) -> Any:
        """One item of a list column, without reading the others."""
        return self._scalar(self._batch.schema.get_field_index(name)).values[number].as_py()

    def shape(self, name: str, *path: int | str) -> tuple[int, ...] | None:
        """The shape of a tensor cell, further in along `path`, without its data; None where there is no cell."""
        position = self._batch.schema.get_field_index(name)
        if position < 0:
            return None
        cell = self._scalar(position)
        for step in path:
            cell = cell.values[step] if isinstance(step, int) else cell[step]
        return tuple(cell["shape"].as_py()) if cell.is_valid else None

    def _scalar(self, position: int) -> Any:
        # Below the types of `datasets`, which turn a null array into nan.
        column = self._batch.column(position)
        return getattr(column, "storage", column)[self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns


def _with_offsets(
    source: pa.MemoryMappedFile, stream: pa.RecordBatchReader
) -> Iterator[tuple[int, pa.RecordBatch]]:
    while True:
        offset = source.tell()
        try:
            yield offset, stream.read_next_batch()
        except StopIteration:
            return


def _flat(table: pa.Table) -> pa.Table:
    """Structs as columns of their own, a list of texts as one text, nan as null; copied out of the mapped file."""
    columns, flat = {}, table.flatten()
    for name, column in zip(flat.column_names, flat.columns):
        if pa.types.is_list(column.type):
            column = pc.binary_join(column, " ")
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
        columns[name] = pa.chunked_array([_copied(column)], column.type)
    return pa.table(columns)


def _copied(column: pa.ChunkedArray) -> pa.Array:
    """An array of its own memory: one chunk may otherwise be the mapped file's."""
    return pa.concat_arrays([*column.chunks, pa.array([], column.type)])
