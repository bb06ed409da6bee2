"""Rows read one at a time against `load_from_disk`, and what they keep in memory."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Features, Sequence, Value, load_from_disk

from wan_accel.data import store
from wan_accel.data.rows import Rows
from wan_accel.data.schema import LATENTS_SCHEMA, SchemaError

FEATURES = Features(
    {
        "schema": Value("string"), "clip_id": Value("string"), "data": Value("binary"), "number": Value("float32"),
        "source": {"path": Value("string")}, "modes": Sequence(Value("string")), "items": [{"value": Value("int32")}],
    }
)  # fmt: skip


def write(root: Path, num_rows: int, *, data: bytes = b"x\0", schema: str = LATENTS_SCHEMA, per_part: int = 3) -> Path:
    with store.PartWriter(root, writer="rank0", features=FEATURES, batch_bytes=1) as writer:
        for row in range(num_rows):
            writer.write(
                {
                    "schema": schema, "clip_id": f"clip{row}", "data": data + bytes([row % 7]) + b"\0",
                    "number": float("nan") if row == 1 else row / 10, "source": {"path": f"{row}.mp4"},
                    "modes": ["animation", "replacement"][: row % 3], "items": [{"value": n} for n in range(row % 4)],
                }
            )  # fmt: skip
            if row % per_part == per_part - 1:
                writer.flush()
    return root


def test_rows_are_those_of_load_from_disk(tmp_path: Path) -> None:
    root = write(tmp_path / "set", 10)
    rows = Rows(root, LATENTS_SCHEMA, light=["clip_id", "source", "modes", "number", "absent"])
    expected = list(load_from_disk(str(root)))
    assert len(rows) == 10 and len(rows.parts) == 4
    for index in (9, 0, 4, 3, 1):  # in any order
        row = {name: value for name, value in rows[index].items() if name != "number"}
        assert row == {name: value for name, value in expected[index].items() if name != "number"}
    assert rows[7].item("items", 2) == {"value": 2} and rows[7]["number"] == pytest.approx(0.7)
    assert rows.table.column_names == ["clip_id", "source.path", "modes", "number"]
    assert rows.table["clip_id"].to_pylist() == [row["clip_id"] for row in expected]
    assert rows.table["source.path"].to_pylist() == [f"{row}.mp4" for row in range(10)]
    assert rows.table["modes"].to_pylist()[:3] == ["", "animation", "animation replacement"]
    assert rows.table["number"].to_pylist()[:2] == [0, None]  # nan answers no comparison
    with pytest.raises(KeyError):
        rows[0]["absent"]


def test_copy_for_a_worker_reads_the_same(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "set", 5), LATENTS_SCHEMA, light=["clip_id"])
    first = rows[4]["data"]
    assert pickle.loads(pickle.dumps(rows))[4]["data"] == first


def test_rows_of_another_schema(tmp_path: Path) -> None:
    root = write(tmp_path / "set", 2, schema="wan-accel/latents@2")
    with pytest.raises(SchemaError, match="has schema 'wan-accel/latents@2'"):
        Rows(root, LATENTS_SCHEMA, light=[])


def test_part_that_is_gone(tmp_path: Path) -> None:
    root = write(tmp_path / "set", 5)
    rows = Rows(root, LATENTS_SCHEMA, light=[])
    rows.parts[1].unlink()
    assert rows[0]["clip_id"] == "clip0"
    with pytest.raises(store.StoreError, match=r"is gone: .* was written again while it was read; start again"):
        rows[4]["data"]
    with pytest.raises(store.StoreError, match="is missing"):
        Rows(root, LATENTS_SCHEMA, light=[])


def test_many_batches_cost_little_memory(tmp_path: Path) -> None:
    """1,000 batches of a latents row: a few MB, of which `load_from_disk` would take forty."""
    from wan_accel.data.schema import latents_features

    with store.PartWriter(tmp_path / "set", writer="rank0", features=latents_features(), batch_bytes=1) as writer:
        for row in range(1000):
            writer.write({"schema": LATENTS_SCHEMA, "clip_id": f"clip{row}", "num_frames": 5, "caption": "x" * 100})
    code = (
        "import psutil, sys; from wan_accel.data.rows import Rows; import pyarrow.compute, datasets\n"
        "memory = psutil.Process().memory_info\n"
        "def owned(): return memory().rss - memory().shared\n"
        "before = owned(); rows = Rows(sys.argv[1], 'wan-accel/latents@1', light=['clip_id', 'num_frames', 'keys'])\n"
        "rows[999]['clip_id']; lazy = owned() - before\n"
        "before = owned(); all = datasets.load_from_disk(sys.argv[1]); print(lazy, owned() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True)
    lazy, whole = map(int, done.stdout.split())
    assert lazy < 6e6 < 25e6 < whole, (lazy, whole, done.stderr[-500:])
