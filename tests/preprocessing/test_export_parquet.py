"""Parquet there and back: the same bits, and a folder that `datasets.load_dataset` opens."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk
from same_bits import assert_same_bits, bits, varied_rows
from tiny_clips import clip_row, write_clips

from preprocessing import export_parquet as export_parquet_module
from preprocessing.cli import main
from preprocessing.export_parquet import export_parquet
from preprocessing.import_parquet import import_parquet
from preprocessing.selection import Selection
from preprocessing.verify import verify_clips
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import ANIMATE_COLUMNS, CLIPS_SCHEMA

SMALL_SHARD = 60_000  # two of the small clips


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("parquet") / "clips", varied_rows())


@pytest.fixture(scope="module")
def exported(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "parquet"
    assert export_parquet(dataset, output, shard_bytes=SMALL_SHARD).written == 5
    return output


def test_the_comparison_sees_a_bit():
    """Else a clean result would say nothing."""
    columns = [[-0.0, None, [1]], [0.0, None, [1]], [-0.0, 0.0, [1]], [-0.0, None, [None]]]
    tables = [pa.table({"a": pa.array(c[:2], pa.float32()), "b": pa.array([c[2], None])}) for c in columns]
    seen = [(bits(table["a"]), bits(table["b"])) for table in tables]
    assert all(other != seen[0] for other in seen[1:])


def test_there_and_back_is_bit_by_bit_the_same(dataset, exported, tmp_path):
    assert import_parquet(exported, tmp_path / "back") == 5
    assert_same_bits(store.load(tmp_path / "back", CLIPS_SCHEMA), store.load(dataset, CLIPS_SCHEMA))
    plain = load_from_disk(str(tmp_path / "back"))
    assert plain.features == load_from_disk(str(dataset)).features and len(plain) == 5
    assert store.verify(tmp_path / "back") == []


def test_clips_that_are_sound_verify_after_the_journey_and_join_a_merge(tmp_path):
    settings = {"num_frames": 5}
    made = {"settings_hash": store.settings_hash(settings), "provenance": json.dumps({"settings": settings})}
    dataset = write_clips(tmp_path / "clips", [clip_row(number, **made) for number in range(3)])
    export_parquet(dataset, tmp_path / "out", shard_bytes=SMALL_SHARD)
    import_parquet(tmp_path / "out", tmp_path / "back")
    assert verify_clips(tmp_path / "back").problems == []
    assert load_clip(store.load(tmp_path / "back", CLIPS_SCHEMA)[2]).mask.any()
    more = write_clips(tmp_path / "more", [clip_row(7)])
    assert main(["merge", str(tmp_path / "back"), str(more), "--output", str(tmp_path / "all")]) == 0
    assert main(["status", str(tmp_path / "back")]) == 0


def test_an_imported_dataset_goes_through_the_cache(tmp_path):
    from wan_accel import cache
    from wan_accel.data.latents import LatentsDataset
    from wan_accel.tiny import init_tiny

    export_parquet(write_clips(tmp_path / "clips", [clip_row(0), clip_row(1)]), tmp_path / "out")
    import_parquet(tmp_path / "out", tmp_path / "back")
    init_tiny("animate-14b", tmp_path / "tiny")
    (tmp_path / "recipe.yaml").write_text(
        f"variant: animate-14b\nmodel: {{checkpoint: {tmp_path / 'tiny'}}}\nmethod: {{kind: lora}}\n"
        f"data: {{clips: {tmp_path / 'back'}, latents: {tmp_path / 'latents'}}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, learning_rate: 1.0e-4, max_steps: 1}}\n"
    )
    assert cache.main([str(tmp_path / "recipe.yaml")]) == 0
    assert sorted(LatentsDataset(tmp_path / "latents").clip_ids) == ["square0", "square1"]


def test_load_dataset_opens_the_folder_by_its_card(dataset, exported, tmp_path):
    """The card's features, split and number of clips are checked by load_dataset itself."""
    found = load_dataset(str(exported), split="train", cache_dir=str(tmp_path / "cache"))
    assert_same_bits(found, store.load(dataset, CLIPS_SCHEMA))
    card = (exported / "README.md").read_text()
    wrong = tmp_path / "wrong"
    shutil.copytree(exported, wrong)
    (wrong / "README.md").write_text(card.replace("num_examples: 5", "num_examples: 6"))
    with pytest.raises(Exception, match=r"NonMatchingSplitsSizes|expected.*6"):
        load_dataset(str(wrong), split="train", cache_dir=str(tmp_path / "cache2"))


def test_shards_are_bounded_and_name_their_number(exported):
    shards = sorted(path.name for path in (exported / "data").iterdir())
    assert shards == [f"train-{number:05}-of-00003.parquet" for number in range(3)]
    assert [pq.read_metadata(exported / "data" / shard).num_rows for shard in shards] == [2, 2, 1]


def test_row_groups_are_bounded_within_a_shard(dataset, tmp_path, monkeypatch):
    """A reader of one clip then reads little more than it, however large the dataset is."""
    monkeypatch.setattr(export_parquet_module, "_ROW_GROUP_BYTES", SMALL_SHARD)
    export_parquet(dataset, tmp_path / "out")
    (shard,) = (tmp_path / "out/data").iterdir()
    groups = pq.read_metadata(shard)
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [2, 2, 1]


def test_the_card_has_figures_settings_and_a_licence_to_fill_in(exported):
    _, front, body = (exported / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "unknown" and "## Licence" in body
    assert data["dataset_info"]["splits"][0]["num_examples"] == 5
    assert data["size_categories"] == "n<1K" and data["configs"][0]["data_files"][0]["path"] == "data/train-*"
    for line in (
        "| clips | 5 |", "| frames a clip | 5 (4), 9 (1) |", "| captions | 4 clips, 3 different |",
        "| blur | 2 | 3.5 | 3.5 | 3.5 |", "2 clips with settings `abc`, by av 18.1:", "| num_frames | `5` |",
        r'| caption | `"\|"` |', "3 clips without provenance.",
    ):  # fmt: skip
        assert f"\n{line}\n" in body, line


def test_an_interrupted_export_goes_on_and_keeps_the_edited_card(dataset, tmp_path, monkeypatch):
    output, write = tmp_path / "out", export_parquet_module._write_shard
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        once = lambda *a, **k: stop() if next(calls) else write(*a, **k)  # noqa: E731
        patch.setattr(export_parquet_module, "_write_shard", once)
        with pytest.raises(KeyboardInterrupt):
            export_parquet(dataset, output, shard_bytes=SMALL_SHARD)
    assert len(list((output / "data").iterdir())) == 1
    assert export_parquet(dataset, output, shard_bytes=SMALL_SHARD).kept == 2
    (output / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert export_parquet(dataset, output, shard_bytes=SMALL_SHARD).kept == 5
    assert (output / "README.md").read_text() == "---\nlicense: cc-by-4.0\n---\n"


def stop() -> None:
    raise KeyboardInterrupt


def test_a_choice_of_clips_leaves_and_another_is_refused(dataset, tmp_path):
    chosen = Selection(clips=["square4", "square0"])
    assert export_parquet(dataset, tmp_path / "out", selection=chosen).written == 2
    assert import_parquet(tmp_path / "out", tmp_path / "back") == 2
    expected = store.load(dataset, CLIPS_SCHEMA).select([0, 4]).flatten_indices(keep_in_memory=True)
    assert_same_bits(store.load(tmp_path / "back", CLIPS_SCHEMA), expected)
    with pytest.raises(store.StoreError, match=r"made with other settings .*num_clips: 2 there, 5 now"):
        export_parquet(dataset, tmp_path / "out")


def test_clips_without_people_make_the_journey_too(tmp_path):
    plain = {name: value for name, value in clip_row(0).items() if name not in ANIMATE_COLUMNS}
    dataset = write_clips(tmp_path / "clips", [plain])
    assert main(["export", str(dataset), "--layout=parquet", f"--output={tmp_path / 'out'}"]) == 0
    assert main(["import", str(tmp_path / "out"), "--from=parquet", f"--output={tmp_path / 'back'}"]) == 0
    assert_same_bits(store.load(tmp_path / "back", CLIPS_SCHEMA), store.load(dataset, CLIPS_SCHEMA))
    assert "# Video clips" in (tmp_path / "out/README.md").read_text()
