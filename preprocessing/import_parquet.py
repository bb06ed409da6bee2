"""Parquet shards of clips become a dataset again, row by row the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from preprocessing.export_parquet import DATA_FOLDER, SHARD_NAME
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, check_schema, clips_features

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from datasets import Features

_BATCH_ROWS = 16


def import_parquet(folder: Path, output: Path) -> int:
    """Write the clips of `folder/data/train-*.parquet` to a dataset; returns how many it holds.

    A shard becomes a part. Parts that are there already are kept, so that an interrupted import goes on.

    Raises:
        StoreError: shards are missing, cut short, of other columns or of different exports, a clip is there twice, or
            `output` holds something else: nothing is written then. A shard whose content is damaged: those before it
            are kept.
        SchemaError: rows of another schema.
    """
    shards = _find(folder)
    features = _check_all(shards)
    names = [f"{shard.name}:{shard.stat().st_size}" for shard in shards]
    store.claim_output(output, schema=CLIPS_SCHEMA, settings={"imported": names})
    done = {path.parent.name for path in store.parts(output)}
    for number, shard in enumerate(tqdm(shards, "shards", disable=None)):
        if f"shard{number:05}" not in done:
            _copy(shard, output, f"shard{number:05}", features)
    store.refresh_state(output, features)
    return len(store.load(output, CLIPS_SCHEMA))


def _find(folder: Path) -> list[Path]:
    """The shards of one export, all of them, in order."""
    inside = folder / DATA_FOLDER if (folder / DATA_FOLDER).is_dir() else folder
    found = {path: SHARD_NAME.fullmatch(path.name) for path in sorted(inside.glob("*.parquet"))}
    if not found:
        raise store.StoreError(f"{folder} holds no data/train-*.parquet: give a folder that `export` wrote")
    if foreign := [path.name for path, match in found.items() if match is None]:
        raise store.StoreError(f"{inside} holds {', '.join(foreign)}, which is no shard train-00000-of-00001.parquet")
    counts = {int(match[2]) for match in found.values() if match}
    if len(counts) > 1:
        raise store.StoreError(f"{inside} holds shards of different exports (of {', '.join(map(str, sorted(counts)))})")
    there = {int(match[1]) for match in found.values() if match}
    if missing := sorted(set(range(max(counts))) - there):
        raise store.StoreError(f"{inside} lacks shards {', '.join(map(str, missing))} of {max(counts)}: copy them too")
    return list(found)


def _check_all(shards: list[Path]) -> "Features":
    """Check columns, schema and names of all shards before anything is written; returns the columns."""
    from datasets import Features

    features: Features | None = None
    seen: set[str] = set()
    for shard in shards:
        with _reading(shard) as file:
            columns = Features.from_arrow_schema(file.schema_arrow)
            features = features or columns
            _check_columns(shard, columns, features)
            names = file.read(columns=["schema", "clip_id"])
        for schema in names["schema"].unique().to_pylist():
            check_schema(schema, CLIPS_SCHEMA, str(shard))
        for name in names["clip_id"].to_pylist():
            if name in seen:
                raise store.StoreError(f"clip {name} is there twice, once in {shard.name}")
            seen.add(name)
    assert features is not None
    return features


def _check_columns(shard: Path, columns: "Features", first: "Features") -> None:
    known = [clips_features(animate=True), clips_features(animate=False)]
    if columns == first and columns in known:
        return
    expected = first if columns != first else known["pose_keypoints" not in columns]
    different = sorted(name for name in {*columns, *expected} if columns.get(name) != expected.get(name))
    raise store.StoreError(f"{shard}: its columns are not those of {CLIPS_SCHEMA} ({', '.join(different)} differ)")


def _copy(shard: Path, output: Path, writer_name: str, features: "Features") -> None:
    """One part, finished at once: a part that is there holds the whole shard."""
    import pyarrow as pa

    with (
        _reading(shard) as file,
        store.PartWriter(output, writer=writer_name, features=features, part_bytes=1 << 62) as writer,
    ):
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            writer.write_table(pa.Table.from_batches([batch]))


@contextmanager
def _reading(shard: Path) -> Iterator["pq.ParquetFile"]:
    """Open a shard, pages compared with their checksums; what is wrong with it becomes a StoreError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise store.StoreError(f"{shard} is damaged ({str(error).splitlines()[0]}): copy it again") from error
