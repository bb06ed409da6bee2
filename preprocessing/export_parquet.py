"""Clips leave as parquet shards with a dataset card: a folder for `datasets.load_dataset`, and for a hub."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from preprocessing.card import write_card
from preprocessing.export_folders import EXPORT_SCHEMA, ChosenClips, Exported
from preprocessing.selection import ALL_CLIPS, Selection
from wan_accel.data import store

SHARD_BYTES = 500 << 20  # what hubs recommend for one file
_ROW_GROUP_BYTES = 64 << 20
DATA_FOLDER = "data"
SHARD_NAME = re.compile(r"train-(\d{5})-of-(\d{5})\.parquet")


def export_parquet(
    dataset: Path, output: Path, *, selection: Selection = ALL_CLIPS, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write `output/data/train-*.parquet` and a card, `output/README.md`; rows are the dataset's, bit by bit.

    Shards that are there already are kept, so that an interrupted export goes on, and so is a card, which its
    readers edit. Counts are of clips.

    Raises:
        StoreError: the folder holds something else, or another choice of clips.
        ValueError: the dataset cannot be used, or no clip is chosen.
    """
    chosen = ChosenClips(dataset, selection)
    settings = {
        "layout": "parquet", "dataset": chosen.identity, "num_clips": len(chosen.names), "shard_bytes": shard_bytes,
        "clips": hashlib.sha256("\n".join(chosen.names).encode()).hexdigest()[:16],
    }  # fmt: skip
    store.claim_output(output, schema=EXPORT_SCHEMA, settings=settings)
    sizes = _row_bytes(chosen)
    shards = list(_shards(sizes, shard_bytes))
    (output / DATA_FOLDER).mkdir(exist_ok=True)
    kept = 0
    for number, shard in enumerate(tqdm(shards, "shards", disable=None)):
        path = output / DATA_FOLDER / f"train-{number:05}-of-{len(shards):05}.parquet"
        if path.is_file():
            kept += len(shard)
            continue
        num_bytes = sum(sizes[row] for row in shard)
        _write_shard(chosen, shard, path, rows_per_group=max(1, len(shard) * _ROW_GROUP_BYTES // num_bytes))
    if not (output / "README.md").is_file():
        write_card(chosen, output / "README.md", num_bytes=sum(sizes))
    return Exported(written=len(chosen.rows) - kept, kept=kept)


def _row_bytes(chosen: ChosenClips) -> list[int]:
    """How large each chosen row is; batch by batch, as a slice of the whole table looks at every one of its pieces."""
    batches = chosen.clips.data.table.to_batches()
    sizes = [batch.slice(row, 1).nbytes for batch in batches for row in range(batch.num_rows)]
    return [sizes[row] for row in chosen.rows]


def _shards(sizes: Sequence[int], shard_bytes: int) -> Iterator[range]:
    """Cut rows of these sizes into consecutive ranges of at most `shard_bytes`, or of one row."""
    start, filled = 0, 0
    for number, size in enumerate(sizes):
        if filled and filled + size > shard_bytes:
            yield range(start, number)
            start, filled = number, 0
        filled += size
    if start < len(sizes):
        yield range(start, len(sizes))


def _write_shard(chosen: ChosenClips, shard: range, path: Path, *, rows_per_group: int) -> None:
    from datasets.utils.tqdm import disable_progress_bars, enable_progress_bars

    rows = chosen.clips.select([chosen.rows[number] for number in shard])
    temporary = path.with_name(f".{path.name}.tmp")
    disable_progress_bars()  # a bar a shard, beside our own
    try:
        with temporary.open("wb") as file:
            rows.to_parquet(file, batch_size=rows_per_group, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
    finally:
        enable_progress_bars()
    temporary.rename(path)
