"""What the rows of a dataset are, in a few bytes: for ranks, and for a resumed run, to see that theirs are the same."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsDigest:
    """How many rows, and a hash of their order and of what tells them apart."""

    rows: int
    xxh128: str


def digest_rows(table: pa.Table) -> RowsDigest:
    """Hash columns of texts and integers, row by row in order, however the table is cut into chunks. Torch-free."""
    digest = xxhash.xxh3_128()
    for name, column in zip(table.column_names, table.columns):
        is_text = pa.types.is_string(column.type)
        numbers = pc.fill_null(pc.binary_length(column) if is_text else column, -1)
        digest.update(f"{name}\0".encode())
        digest.update(numbers.to_numpy().astype(np.int64).tobytes())
        if is_text:
            digest.update("".join(pc.fill_null(column, "").to_pylist()).encode())
    return RowsDigest(rows=len(table), xxh128=digest.hexdigest())


def join_digests(digests: Sequence[RowsDigest], weights: Sequence[float] | None) -> RowsDigest:
    """The digest of datasets one after the other, drawn from with these weights."""
    described = json.dumps([[one.xxh128 for one in digests], list(weights or [])])
    return RowsDigest(rows=sum(one.rows for one in digests), xxh128=xxhash.xxh3_128(described.encode()).hexdigest())
