"""The on-disk protocol with real files and processes: kills, cut parts, full disks, foreign folders."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Features, Image, Value, Video, load_from_disk

from wan_accel.data import opened, store
from wan_accel.data.schema import CLIPS_SCHEMA, SchemaError, clips_features

ROOT = Path(__file__).parents[2]
FEATURES = Features({"schema": Value("string"), "clip_id": Value("string"), "mask": Value("binary")})
SETTINGS = {"fps": 16, "sizes": (480, 832), "detector": "yolo"}

# Writes rows 0..`last` that are not there yet, about 1.5 KB each: 64 rows a batch, 128 a part.
WRITER = """
import os, sys, time
from pathlib import Path
from datasets import Features, Value
from wan_accel.data import store
root, name, first, last, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
features = Features({"schema": Value("string"), "clip_id": Value("string"), "mask": Value("binary")})
store.claim_output(root, schema="wan-accel/clips@1", settings={"fps": 16})
done = store.ids(root, "clip_id")
with store.PartWriter(root, writer=name, features=features, part_bytes=150_000) as writer:
    print("started", flush=True)
    for number in range(first, last):
        if str(number) not in done:
            time.sleep(pause)
            mask = number.to_bytes(2, "big") * 750
            writer.write({"schema": "wan-accel/clips@1", "clip_id": str(number), "mask": mask})
    if "hold" in sys.argv:
        print("written", flush=True)
        sys.stdin.read()
"""


def start_writer(root: Path, name: str, first: int, last: int, *more: str, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), name, str(first), str(last), str(pause), *more]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **streams)


def row(number: int, schema: str = CLIPS_SCHEMA) -> dict[str, object]:
    return {"schema": schema, "clip_id": str(number), "mask": number.to_bytes(2, "big") * 750}


def write(root: Path, numbers: range, *, writer: str = "w0", schema: str = CLIPS_SCHEMA, **options: int) -> None:
    with store.PartWriter(root, writer=writer, features=FEATURES, **options) as parts:
        for number in numbers:
            parts.write(row(number, schema))


def numbers_of(root: Path) -> list[int]:
    """Sorted clip numbers as plain `datasets` reads them, each row's content checked."""
    rows = load_from_disk(str(root))
    for clip in rows:
        assert clip == row(int(clip["clip_id"]))
    return sorted(map(int, rows["clip_id"]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    store.claim_output(folder, schema=CLIPS_SCHEMA, settings=SETTINGS)
    return folder


def test_rows_and_video_and_image_types_come_back_through_load_from_disk(root):
    from PIL import Image as PilImage

    picture = PilImage.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    keypoints = np.random.default_rng(0).random((5, 133, 3), dtype=np.float32)
    full = {
        "schema": CLIPS_SCHEMA, "clip_id": "a", "source": {"path": "a.mp4", "sha256": "0", "start_seconds": 0.5,
        "end_seconds": 1.0, "track": 0}, "timestamps": [0.5, 0.75], "video": {"bytes": b"mp4\0", "path": None},
        "reference": picture, "modes": ["animation"], "keypoints": keypoints, "mask": b"\1\0",
    }  # fmt: skip
    with store.PartWriter(root, writer="w0", features=clips_features()) as writer:
        writer.write(full)
        writer.write({"schema": CLIPS_SCHEMA, "clip_id": "b"})
    rows = load_from_disk(str(root))
    assert rows.features == clips_features()
    assert rows.features["video"] == Video(decode=False) and rows.features["reference"] == Image()
    first, second = rows[0], rows[1]
    assert first["video"] == full["video"] and first["mask"] == b"\1\0" and first["source"] == full["source"]
    assert first["timestamps"] == [0.5, 0.75] and first["modes"] == ["animation"]
    np.testing.assert_array_equal(np.asarray(first["reference"]), np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(first["keypoints"], np.float32), keypoints)
    assert second["video"] is None and second["caption"] is None and second["reference"] is None


def test_parts_are_cut_at_their_size_and_sidecars_tell_the_truth(root):
    write(root, range(300), part_bytes=150_000)
    found = store.parts(root)
    assert [sidecar.rows for sidecar in found.values()] == [128, 128, 44]
    assert all(part.stat().st_size == sidecar.bytes for part, sidecar in found.items())
    assert numbers_of(root) == list(range(300))
    assert len(store.load(root, CLIPS_SCHEMA)) == 300
    assert store.load(root, CLIPS_SCHEMA, columns=["mask"]).column_names == ["mask"]
    assert store.verify(root) == []


def test_finished_parts_are_visible_while_the_writer_goes_on(root):
    with store.PartWriter(root, writer="w0", features=FEATURES) as writer:
        writer.write(row(0))
        writer.flush()
        writer.write(row(1))
        assert numbers_of(root) == [0]
        assert store.ids(root, "clip_id") == {"0"}
    assert numbers_of(root) == [0, 1]


def test_two_processes_write_at_once(tmp_path):
    root = tmp_path / "out"
    writers = [start_writer(root, f"w{i}", 1000 * i, 1000 * i + 700) for i in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert numbers_of(root) == [*range(700), *range(1000, 1700)]
    assert len(store.load(root, CLIPS_SCHEMA)) == 1400


def test_a_writer_that_finishes_between_reading_and_writing_the_state_is_not_lost(root, monkeypatch):
    original, pending = store.write_json, [range(3, 6)]

    def write_json(path: Path, content: object) -> None:
        if path.name == "state.json" and pending:
            write(root, pending.pop(), writer="w1")  # lists both; then the older list replaces it
        original(path, content)

    write(root, range(3))
    monkeypatch.setattr(opened, "write_json", write_json)
    store.refresh_state(root, FEATURES)
    assert not pending and numbers_of(root) == [0, 1, 2, 3, 4, 5]


def test_a_part_that_is_finished_while_the_dataset_is_opened_is_no_error(root, monkeypatch):
    import datasets

    write(root, range(3))
    listing = store.listed(root)
    load = datasets.load_from_disk

    def load_later(path: str) -> object:
        write(root, range(3, 6), writer="a")  # its part comes before the others
        return load(path)

    monkeypatch.setattr(datasets, "load_from_disk", load_later)
    assert len(store.load(root, CLIPS_SCHEMA)) == 6
    # A process that opens the folder with an older listing sees the older rows.
    assert [part.parent.name for part in store.open_parts(root, CLIPS_SCHEMA, listing)] == ["w0"]
    assert [part.parent.name for part in store.open_parts(root, CLIPS_SCHEMA)] == ["a", "w0"]


def test_whole_tables_go_in_beside_rows_and_parts_are_cut(root):
    write(root, range(40), writer="rows")
    table = load_from_disk(str(root)).data.table
    with store.PartWriter(root, writer="tables", features=FEATURES, part_bytes=40_000) as writer:
        writer.write(row(90))
        for start in range(0, 40, 10):
            writer.write_table(table.slice(start, 10).combine_chunks())
    parts = [sidecar.rows for part, sidecar in store.parts(root).items() if part.parent.name == "tables"]
    assert sum(parts) == 41 and len(parts) > 1
    assert sorted(numbers_of(root)) == sorted([*range(40), 90, *range(40)])
    assert store.verify(root) == []
    with (
        store.PartWriter(root, writer="wrong", features=FEATURES) as writer,
        pytest.raises(store.StoreError, match="have other columns than it: schema, mask"),
    ):
        writer.write_table(table.drop_columns(["clip_id"]))


def test_an_unknown_column_is_refused(root):
    with (
        pytest.raises(store.StoreError, match=r"columns that .*out does not have: captoin"),
        store.PartWriter(root, writer="w0", features=FEATURES) as writer,
    ):
        writer.write({**row(0), "captoin": "a"})


def test_a_killed_writer_loses_only_its_open_part(tmp_path):
    root = tmp_path / "out"
    writer = start_writer(root, "w0", 0, 330, "hold")
    assert writer.stdout is not None
    assert [writer.stdout.readline() for _ in range(2)] == ["started\n", "written\n"]
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert list(root.glob("parts/w0/*.tmp")), "the kill was meant to hit an open part"
    assert numbers_of(root) == list(range(256))
    assert len(store.load(root, CLIPS_SCHEMA)) == 256
    assert start_writer(root, "w0", 0, 400).wait() == 0
    assert numbers_of(root) == list(range(400))
    assert not list(root.rglob("*.tmp"))


@pytest.mark.parametrize("second_finishes_first", [True, False])
def test_two_runs_under_one_name_do_not_damage_each_other(tmp_path, second_finishes_first):
    root = tmp_path / "out"
    first = start_writer(root, "w0", 0, 330, "hold")
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["started\n", "written\n"]
    second = store.PartWriter(root, writer="w0", features=FEATURES)  # takes the first one's file for a leftover
    second.write(row(1000))
    second._write_batch()
    if second_finishes_first:
        second.close()
    _, error = first.communicate()
    assert first.returncode == 1
    assert f"{root}/parts/w0/data-00002.arrow is written by another run at the same time: this one stops" in error
    second.close()
    assert numbers_of(root) == [*range(256), 1000]
    assert store.verify(root) == [] and not list(root.rglob("*.tmp"))


def test_kills_at_any_moment_leave_every_row_once(tmp_path):
    root = tmp_path / "out"
    for seconds in (0.1, 0.6):
        writer = start_writer(root, "w0", 0, 1500, pause=0.001)
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            writer.wait(seconds)
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.wait()
    assert start_writer(root, "w0", 0, 1500).wait() == 0
    assert numbers_of(root) == list(range(1500))


def test_a_part_killed_before_its_sidecar_is_written_again(root):
    write(root, range(3))
    write(root, range(3, 5))
    (root / "parts/w0/data-00001.arrow.json").unlink()
    assert store.ids(root, "clip_id") == {"0", "1", "2"}
    write(root, range(3, 5))
    assert numbers_of(root) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("read", [lambda root: store.load(root, CLIPS_SCHEMA), lambda root: store.ids(root, "clip_id")])
def test_a_part_cut_at_a_batch_boundary_is_one_error_that_names_it(root, read):
    write(root, range(200))
    part = root / "parts/w0/data-00000.arrow"
    keep = part.read_bytes().index((64).to_bytes(2, "big") * 750) - 4000
    os.truncate(part, keep)
    with pytest.raises(store.StoreError, match=rf"data-00000.arrow is damaged: {keep} bytes, its sidecar says \d+"):
        read(root)


@pytest.mark.parametrize("read", [lambda root: store.load(root, CLIPS_SCHEMA), lambda root: store.ids(root, "clip_id")])
def test_a_missing_part_is_named(root, read):
    write(root, range(3))
    (root / "parts/w0/data-00000.arrow").unlink()
    with pytest.raises(store.StoreError, match=r"data-00000.arrow is missing"):
        read(root)


def test_a_part_removed_with_its_sidecar_is_named_until_a_run_replaces_it(root):
    write(root, range(3))
    write(root, range(3, 6))
    for path in root.glob("parts/w0/data-00000.*"):
        path.unlink()
    with pytest.raises(store.StoreError, match=r"data-00000.arrow .* run the command that made it again"):
        store.load(root, CLIPS_SCHEMA)
    write(root, range(3))
    assert numbers_of(root) == [0, 1, 2, 3, 4, 5]


def test_row_counts_are_compared_with_the_sidecars(root):
    write(root, range(3))
    path = root / "parts/w0/data-00000.arrow.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": 4}))
    with pytest.raises(store.StoreError, match="loads 3 rows, its sidecars say 4"):
        store.load(root, CLIPS_SCHEMA)
    assert store.verify(root) == [f"{path.with_suffix('')}: 3 rows, expected 4"]


def test_verify_finds_a_changed_byte_a_cut_and_a_missing_part(root):
    for first in (0, 3, 6, 9):
        write(root, range(first, first + 3))
    paths = [root / f"parts/w0/data-{i:05}.arrow" for i in range(4)]
    data = bytearray(paths[0].read_bytes())
    data[len(data) // 2] ^= 1
    paths[0].write_bytes(data)
    size = paths[1].stat().st_size
    os.truncate(paths[1], size - 8)
    paths[2].unlink()
    assert store.verify(root) == [
        f"{paths[0]}: content differs from its hash",
        f"{paths[1]}: {size - 8} bytes, expected {size}",
        f"{paths[2]}: missing",
    ]


def test_a_damaged_sidecar_is_named(root):
    write(root, range(3))
    (root / "parts/w0/data-00000.arrow.json").write_text("{")
    with pytest.raises(store.StoreError, match=r"data-00000.arrow.json is damaged"):
        store.load(root, CLIPS_SCHEMA)


@pytest.mark.parametrize("schema", ["wan-accel/clips@2", "wan-accel/latents@1"])
def test_rows_of_another_schema_are_refused_wherever_they_are(root, schema):
    write(root, range(3))
    write(root, range(3, 4), schema=schema)
    with pytest.raises(SchemaError, match=f"has schema '{schema}', expected 'wan-accel/clips@1'"):
        store.load(root, CLIPS_SCHEMA)


def test_a_run_of_another_schema_is_refused(root):
    with pytest.raises(SchemaError, match="has schema 'wan-accel/clips@1', expected 'wan-accel/latents@1'"):
        store.claim_output(root, schema="wan-accel/latents@1", settings=SETTINGS)


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(store.StoreError, match=r"no state\.json"):
        store.load(tmp_path, CLIPS_SCHEMA)
    with pytest.raises(store.StoreError, match="is remote: copy it to a local disk first"):
        store.load("s3://bucket/clips", CLIPS_SCHEMA)  # type: ignore[arg-type]


def test_a_dataset_of_another_tool_is_refused(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"other/data-.* has no sidecar"):
        store.load(tmp_path / "other", CLIPS_SCHEMA)


def test_a_folder_with_foreign_files_is_not_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(store.StoreError, match="is not empty and was not made by wan-accel"):
        store.claim_output(tmp_path, schema=CLIPS_SCHEMA, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_the_same_settings_claim_again_and_others_are_named(root):
    store.claim_output(root, schema=CLIPS_SCHEMA, settings=SETTINGS)
    with pytest.raises(store.StoreError, match=r"\(fps: 16 there, 24 now; sam: None there, 'base' now\)"):
        store.claim_output(root, schema=CLIPS_SCHEMA, settings={**SETTINGS, "fps": 24, "sam": "base"})
    store.claim_output(root, schema=CLIPS_SCHEMA, settings=SETTINGS)


def test_a_claim_killed_halfway_can_be_made_again(tmp_path):
    (tmp_path / "wan_accel_run.json.123.tmp").write_text("{")
    store.claim_output(tmp_path, schema=CLIPS_SCHEMA, settings=SETTINGS)


def test_a_folder_that_another_rank_claims_meanwhile_is_ours(tmp_path, monkeypatch):
    """It writes the run file and its first part between one look at the folder and the next."""
    look = Path.iterdir

    def claimed_meanwhile(folder):
        monkeypatch.undo()
        store.claim_output(folder, schema=CLIPS_SCHEMA, settings=SETTINGS)
        write(folder, range(1))
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", claimed_meanwhile)
    store.claim_output(tmp_path, schema=CLIPS_SCHEMA, settings=SETTINGS)
    assert numbers_of(tmp_path) == [0]


def test_an_exception_drops_the_open_part_only(root):
    with (
        pytest.raises(RuntimeError, match="of the caller"),
        store.PartWriter(root, writer="w0", features=FEATURES) as writer,
    ):
        writer.write(row(0))
        writer.flush()
        for number in range(1, 100):
            writer.write(row(number))
        raise RuntimeError("of the caller")
    assert numbers_of(root) == [0]
    assert not list(root.rglob("*.tmp"))


# 200 KB a file at most, as on a full disk: the first part fits, the second does not.
FULL_DISK = """
import resource, sys
from pathlib import Path
from datasets import Features, Value
from wan_accel.data import store
features = Features({"schema": Value("string"), "clip_id": Value("string"), "mask": Value("binary")})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with store.PartWriter(Path(sys.argv[1]), writer="w0", features=features) as writer:
        for number in range(int(sys.argv[2])):
            row = {"schema": "wan-accel/clips@1", "clip_id": str(number), "mask": number.to_bytes(2, "big") * 750}
            writer.write(row)
            if number == 99:
                writer.flush()
except store.StoreError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("num_rows", [1000, 260], ids=["in write", "in close"])
def test_a_full_disk_is_one_error_and_earlier_parts_stay(root, num_rows):
    command = [sys.executable, "-c", FULL_DISK, str(root), str(num_rows)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "")
    assert result.stdout.startswith(f"no space left for {root}/parts/w0/data-00001.arrow")
    assert "run the same command again; finished parts are kept" in result.stdout
    assert not list(root.rglob("*.tmp"))
    assert numbers_of(root) == list(range(100))
    assert len(store.load(root, CLIPS_SCHEMA)) == 100 and store.verify(root) == []
