"""Damaged, missing and foreign shards are refused; what was interrupted goes on."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from same_bits import assert_same_bits, varied_rows
from tiny_clips import write_clips

from preprocessing.cli import main
from preprocessing.export_parquet import export_parquet
from preprocessing.import_parquet import import_parquet
from preprocessing.selection import Selection
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, SchemaError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "clips", varied_rows())


@pytest.fixture(scope="module")
def exported(dataset, tmp_path_factory):
    """Three shards of 2, 2 and 1 clips."""
    output = tmp_path_factory.mktemp("exported") / "parquet"
    export_parquet(dataset, output, shard_bytes=60_000)
    return output


def stop() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_import_goes_on(dataset, exported, tmp_path, monkeypatch):
    output, write = tmp_path / "back", store.PartWriter.write_table
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        patch.setattr(store.PartWriter, "write_table", lambda *a: write(*a) if next(calls) < 1 else stop())
        with pytest.raises(KeyboardInterrupt):
            import_parquet(exported, output)
    assert len(load_from_disk(str(output))) == 2
    assert import_parquet(exported, output) == 5
    assert_same_bits(store.load(output, CLIPS_SCHEMA), store.load(dataset, CLIPS_SCHEMA))
    assert import_parquet(exported, output) == 5


@pytest.fixture
def shards(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "in")
    return tmp_path / "in/data"


def refused(shards, tmp_path, error=store.StoreError, match=""):
    with pytest.raises(error, match=match):
        import_parquet(shards.parent, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_missing_damaged_and_foreign_shards_are_refused_before_anything_is_written(shards, tmp_path):
    last = shards / "train-00002-of-00003.parquet"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    refused(shards, tmp_path, match=r"train-00002-of-00003\.parquet is damaged .*copy it again")
    last.unlink()
    refused(shards, tmp_path, match="lacks shards 2 of 3: copy them too")
    (shards / "train-00000-of-00001.parquet").write_bytes(whole)
    refused(shards, tmp_path, match=r"shards of different exports \(of 1, 3\)")
    (shards / "train-00000-of-00001.parquet").rename(shards / "mine.parquet")
    refused(shards, tmp_path, match=r"holds mine\.parquet, which is no shard")
    refused(tmp_path / "nowhere/data", tmp_path, match=r"holds no data/train-\*\.parquet")


def test_a_changed_byte_in_a_video_is_noticed(shards, tmp_path):
    path = shards / "train-00001-of-00003.parquet"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"mdat") + 100] ^= 1
    good = path.read_bytes()
    path.write_bytes(whole)
    with pytest.raises(store.StoreError, match=r"train-00001-of-00003\.parquet is damaged .*checksum.*: copy it again"):
        import_parquet(shards.parent, tmp_path / "back")
    assert len(load_from_disk(str(tmp_path / "back"))) == 2
    path.write_bytes(good)
    assert import_parquet(shards.parent, tmp_path / "back") == 5


def rewrite(path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_another_schema_is_refused(shards, tmp_path):
    def change(table):
        return table.set_column(0, table.schema.field(0), pa.array(["wan-accel/clips@2"] * len(table)))

    rewrite(shards / "train-00001-of-00003.parquet", change)
    refused(shards, tmp_path, SchemaError, "has schema 'wan-accel/clips@2', expected 'wan-accel/clips@1'")


def test_other_columns_are_refused(shards, tmp_path):
    rewrite(shards / "train-00001-of-00003.parquet", lambda table: table.drop_columns(["mask"]))
    refused(shards, tmp_path, match=r"its columns are not those of wan-accel/clips@1 \(mask differ")


def test_a_clip_that_is_there_twice_is_refused(shards, tmp_path):
    shutil.copyfile(shards / "train-00000-of-00003.parquet", shards / "train-00001-of-00003.parquet")
    refused(shards, tmp_path, match=r"clip square0 is there twice, once in train-00001")


def test_other_shards_into_the_same_dataset_are_refused(dataset, exported, tmp_path):
    import_parquet(exported, tmp_path / "back")
    export_parquet(dataset, tmp_path / "one", selection=Selection(clips=["square0"]))
    with pytest.raises(store.StoreError, match=r"made with other settings .*imported"):
        import_parquet(tmp_path / "one", tmp_path / "back")


def test_options_of_other_origins_are_refused(exported, tmp_path, capsys):
    back = ["import", str(exported), f"--output={tmp_path / 'back'}", "--from=parquet"]
    assert main([*back, "--revision=main", "--base-path=x"]) == 2
    assert "--from parquet has no --base-path, --revision: leave it out" in capsys.readouterr().err
