"""An export of full weights holds one output shard in memory, whatever was trained and on whichever engine."""

import json
from pathlib import Path

import pytest
import torch
from exports import lora_tensors, write_run
from memory import peak_anonymous_bytes
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor

from wan_accel import export_full
from wan_accel.export import export
from wan_accel.models.dit import build_dit
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import DitSize

SIZE = DitSize(
    dim=384, ffn_dim=2048, num_layers=3, num_heads=8, in_dim=16, out_dim=16, freq_dim=32, text_dim=24
)  # largest tensor 3 MiB
SHARD = 6 * 2**20
# Beside the shard: a tensor and its copy in another dtype or layout, threads, pickled metadata.
REST = 8 * 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in the original layout, 2 x 39 MB."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_dit(SIZE).state_dict().items()}
    folder = tmp_path_factory.mktemp("base")
    for seed, expert in enumerate(("high", "low")):
        (folder / f"{expert}_noise_model").mkdir()
        state = {name: torch.full(shape, 0.5 + seed) for name, shape in shapes.items()}
        save_file(state, folder / f"{expert}_noise_model" / "x.safetensors")
        (folder / f"{expert}_noise_model" / "config.json").write_text(json.dumps({"num_heads": SIZE.num_heads}))
    return folder


def state_of(base: Path, expert: str) -> dict[str, Tensor]:
    reader = CheckpointReader(base / f"{expert}_noise_model")
    return {name: reader.read(name) for name in reader.shapes}


def write_trained(base: Path, run: Path, method: str, engine: str) -> dict[str, Tensor]:
    """A run that trained both experts; returns what an export of it is to hold."""
    expected, trained = {}, {}
    for expert in ("high", "low"):
        state = state_of(base, expert)
        expected |= {f"{expert}.{name}": tensor + 1 for name, tensor in state.items()}
        if method == "lora":
            trained |= {f"{expert}.{k}": v for k, v in lora_tensors(state, ["blocks.0.ffn.0"]).items()}
    write_run(run, base, "t2v-a14b", trained or expected, method=method, engine=engine, expert="both")
    return expected


def export_peak(run: str, output: str, merge: bool) -> int:
    """On a rank: the most memory that an export in shards of `SHARD` has at once."""
    export_full.MAX_SHARD_BYTES = SHARD
    with peak_anonymous_bytes(0.001) as held:
        export(Path(run), output=Path(output), merge=merge)
    return held[0]


@pytest.mark.parametrize(
    ("method", "engine", "merge"), [("full", "single", False), ("full", "zero3", False), ("lora", "single", True)]
)
def test_one_shard_is_in_memory(base: Path, tmp_path: Path, method: str, engine: str, merge: bool) -> None:
    expected = write_trained(base, tmp_path / "run", method, engine)
    whole = sum(tensor.nbytes for tensor in expected.values())
    # In a process of its own: what earlier tests have left would be used again, and hide what is needed.
    peak = run_ranks(export_peak, 1, str(tmp_path / "run"), str(tmp_path / "x"), merge, engine="single")[0]
    assert SHARD / 2 < peak < SHARD + REST < whole / 3, f"{peak / 2**20:.1f} MiB of {whole / 2**20:.1f}"
    written = state_of(tmp_path / "x", "low")
    assert len(list((tmp_path / "x" / "low_noise_model").glob("*.safetensors"))) >= whole / 2 / SHARD
    if method == "full":
        for name, tensor in written.items():
            assert torch.equal(tensor, expected[f"low.{name}"]), name
