"""The light columns of a clips dataset as one flat table: all clips at once, without a picture or a point."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, check_schema

_LIGHT = (
    "schema", "clip_id", "source", "caption", "num_frames", "height", "width", "fps", "purpose", "modes",
    "reference_source", "quality", "settings_hash",
)  # fmt: skip
PART, ROW = "part", "row"
QUALITY_PREFIX = "quality."


def read_clip_table(dataset: Path) -> pa.Table:
    """A row a clip: numbers and texts only, structs as `source.path` or `quality.blur`; what is no number is null.

    Besides the dataset's columns: `part` (relative to the dataset) and `row` in it, `seconds` (it lasts), `size` (width
    x height), and `modes` as one text. One part after the other is mapped into memory, and the other columns are not
    read: `datasets.load_from_disk` keeps a table of all columns of all batches, gigabytes for a million clips.

    Raises:
        StoreError: it is no dataset of clips, or a part is missing or damaged.
    """
    tables = [_part_table(dataset, part) for part in store.open_parts(dataset, CLIPS_SCHEMA)]
    if not tables:
        raise store.StoreError(f"{dataset} has no finished part yet: look again when the run has committed its first")
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    for schema in table["schema"].unique().to_pylist():
        check_schema(schema, CLIPS_SCHEMA, str(dataset))
    columns = {name: _plain(table[name]) for name in table.column_names if name != "schema"}
    columns["seconds"] = _plain(pc.divide(pc.cast(table["num_frames"], pa.float64()), table["fps"]))
    sides = (pc.cast(table[side], pa.string()) for side in ("width", "height"))
    columns["size"] = pc.binary_join_element_wise(*sides, "x")
    return pa.table(columns)


def _part_table(dataset: Path, part: Path) -> pa.Table:
    with pa.memory_map(str(part)) as source, pa.ipc.open_stream(source) as stream:
        names = [name for name in _LIGHT if name in stream.schema.names]
        batches = [batch.select(names) for batch in stream]
        schema = pa.schema([stream.schema.field(name) for name in names])
        table = pa.Table.from_batches(batches, schema).flatten().combine_chunks()
    name = str(part.relative_to(dataset))
    return table.append_column(PART, pa.array([name] * len(table), pa.string())).append_column(
        ROW, pa.array(np.arange(len(table)))
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A list of texts as one text, nan and infinity as null."""
    if pa.types.is_list(column.type):
        return pc.binary_join(column, " ")
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return column


def figures(table: pa.Table) -> list[str]:
    """The quality figures that a table has, without their prefix."""
    return [name.removeprefix(QUALITY_PREFIX) for name in table.column_names if name.startswith(QUALITY_PREFIX)]


def values(table: pa.Table, column: str) -> np.ndarray:
    """The numbers of a column that are there, as float64."""
    return np.asarray(pc.drop_null(table[column]).cast(pa.float64()))
