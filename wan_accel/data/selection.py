"""Which rows `data.where` chooses, of a clips or of a latents dataset. Torch-free."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from wan_accel.data.where import parse_where

# What both datasets have, under one name; quality.* beside. `modes` is one text, e.g. "animation replacement".
_COLUMNS = ("clip_id", "num_frames", "height", "width", "fps", "modes")
_QUALITY = "quality."


def choose_rows(table: pa.Table, captions: Sequence[str], where: str | None) -> list[int]:
    """The numbers of the rows that an expression holds for, all without one.

    Args:
        table: light columns (`data.rows`) of a clips or latents dataset.
        captions: of every row, an overlay applied.
        where: the expression; it can also name `caption` and `source_sha256`.

    Raises:
        ValueError: it makes no sense, or names a column that there is not.
    """
    if where is None:
        return list(range(len(table)))
    names = [name for name in table.column_names if name in _COLUMNS or name.startswith(_QUALITY)]
    columns = {name: table[name] for name in names}
    columns["caption"] = pa.array(captions, pa.string())
    columns["source_sha256"] = table["source.sha256" if "source.sha256" in table.column_names else "source_sha256"]
    rows = pa.table({**columns, "row": pa.array(np.arange(len(table)))})
    types = dict(zip(rows.schema.names, rows.schema.types))
    del types["row"]
    return rows.filter(parse_where(where, types, option="data.where"))["row"].to_pylist()
