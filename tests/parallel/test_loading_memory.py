"""A rank reads its own slices of a checkpoint and holds little more than its shard while it does."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from loading import CountingReader, load, write_checkpoint

from wan_accel.models.dit import build_dit, dit_size_from_shapes

# Threads, hooks and meshes of a rank; a checkpoint of 2 GB makes them disappear (benchmarks/loading.py).
REST = 8 * 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    write_checkpoint(folder, 0.06, dim=768)
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_and_hold_their_shards(folder: Path, ranks: int) -> None:
    found = run_ranks(load, ranks, str(folder), 1, engine="fsdp2")
    reader = CountingReader(folder)
    with torch.device("meta"):
        model = build_dit(dit_size_from_shapes(reader.shapes, num_heads=reader.num_heads))
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    assert sum(row["read_bytes"] for row in found) == total  # every byte once, on one of the ranks
    for row in found:
        assert row["read_bytes"] <= 1.05 * total / ranks  # short dim 0: the first ranks hold a row more
        # FSDP2 pads shards that are a row short; those bytes are not read.
        assert row["read_bytes"] <= row["local_bytes"] <= 1.02 * row["read_bytes"] + 1024
        assert row["held_bytes"] <= 1.3 * row["local_bytes"] + row["largest_bytes"] + REST


def test_plain_reading_is_of_the_same_bytes(folder: Path) -> None:
    """What the benchmark compares with reads the rows that were asked for."""
    reader = CountingReader(folder)
    for name in list(reader.shapes)[::7]:
        rows = slice(1, 3) if reader.shapes[name] and reader.shapes[name][0] > 3 else None
        tensor = reader.read(name, rows)
        reader.read_into(name, torch.empty_like(tensor), rows)
        file, offset, length = reader.place(*reader.asked[-1])
        content = (folder / file).read_bytes()[offset : offset + length]
        assert torch.frombuffer(bytearray(content), dtype=torch.bfloat16).equal(tensor.flatten())
    assert reader.read_plainly() > 0


def test_zero3_reads_once_and_holds_its_shard(folder: Path) -> None:
    """Rank 0 reads all; DeepSpeed makes each parameter whole before it partitions it."""
    found = run_ranks(load, 2, str(folder), 1, engine="zero3")
    assert [row["read_bytes"] > 0 for row in found] == [True, False]
    for row in found:
        assert row["local_bytes"] == pytest.approx(found[0]["read_bytes"], rel=0.01)  # half of them, in fp32
        assert row["held_bytes"] <= 1.3 * row["local_bytes"] + row["largest_bytes"] + REST
