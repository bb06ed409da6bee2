"""What a rank reads, holds and needs of time to load its shard: `python benchmarks/loading.py [--gib 2]`.

Writes a synthetic checkpoint of random bf16 weights in several files, loads it under FSDP2 on 1, 2 and 4 gloo ranks
and under ZeRO-3 on 2, and prints a row for each. The page cache is warm: what is compared is our reading with plain
reading of the same bytes, not the disk. docs/BENCHMARKS.md explains the columns.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from memory import peak_anonymous_bytes
from ranks import run_ranks

from wan_accel.models.reader import CheckpointReader

GIB = 2**30
NUM_FILES = 5
LAYOUTS = (("single", 1), ("fsdp2", 2), ("fsdp2", 4), ("zero3", 2))


def write_checkpoint(folder: Path, gib: float, *, dim: int = 1536) -> int:
    """Random bf16 weights of a DiT as deep as `gib` allows, in several files; returns the bytes."""
    from wan_accel.models.dit import build_dit
    from wan_accel.models.variants import DitSize

    folder.mkdir(parents=True)
    per_layer = 2 * (8 * dim * dim + 2 * dim * 6 * dim)
    size = DitSize(
        dim=dim, ffn_dim=6 * dim, num_layers=max(round(gib * GIB / per_layer), NUM_FILES), num_heads=12, in_dim=16,
        out_dim=16, text_dim=512,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_dit(size).state_dict().items()}
    names, weight_map, total = sorted(shapes), {}, 0
    for number in range(NUM_FILES):
        part = names[number::NUM_FILES]
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.1, 0.1) for name in part}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"num_heads": 12}))
    return total


class CountingReader(CheckpointReader):
    """A reader that keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[str, slice | None]] = []
        self.num_bytes = 0

    def _read_stored_into(self, name: str, rows: slice | None, target: torch.Tensor) -> None:
        super()._read_stored_into(name, rows, target)
        self.asked.append((name, rows))
        self.num_bytes += self.place(name, rows)[2]

    def place(self, name: str, rows: slice | None) -> tuple[str, int, int]:
        """File, offset and length of a tensor's rows, from the header that safetensors files begin with."""
        file = self._owner[name]
        return file, *self._places[file].place(name, rows)

    def read_plainly(self) -> float:
        """Seconds of CPU time that it takes to read the same bytes with pread into memory that is there already."""
        places = [self.place(name, rows) for name, rows in self.asked]
        buffer, filled = memoryview(bytearray(sum(length for _, _, length in places))), 0
        files = {file: os.open(self.folder / file, os.O_RDONLY) for file, _, _ in places}
        started = time.process_time()
        for file, offset, length in places:
            os.preadv(files[file], [buffer[filled : filled + length]], offset)
            filled += length
        seconds = time.process_time() - started
        for descriptor in files.values():
            os.close(descriptor)
        return seconds


def load(folder: str, repeats: int) -> dict[str, Any]:
    """On a rank: assemble a model, and say what was read and held; then fill it again, beside plain reading."""
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.assemble import Techniques, assemble
    from wan_accel.models.loading import fill_parameters
    from wan_accel.models.variants import VARIANTS
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.parallel.engine import launched_engine
    from wan_accel.parallel.mesh import ParallelDims

    enable_fsdp_on_cpu()
    engine = launched_engine()
    args = WanTrainingArguments(
        output_dir=f"{folder}/run", use_cpu=engine != "zero3", ddp_backend=None if engine == "single" else "gloo"
    )
    device, reader = args.device, CountingReader(Path(folder))
    # bf16 under ZeRO-3 needs fp32 masters, which are made later: it loads fp32.
    techniques = Techniques(torch_dtype=torch.float32 if engine == "zero3" else torch.bfloat16)
    dims = ParallelDims(world_size=args.world_size)
    with peak_anonymous_bytes() as held:
        model = assemble(VARIANTS["t2v-1.3b"], reader, techniques, engine=engine, dims=dims, device=device)
    itemsize = torch.finfo(techniques.torch_dtype).bits // 8
    found = {
        "local_bytes": sum(_local(parameter).nbytes for parameter in model.parameters()),
        "read_bytes": reader.num_bytes,
        "held_bytes": held[0],
        "largest_bytes": max(torch.Size(shape).numel() for shape in reader.shapes.values()) * itemsize,
    }
    timings = [_refill(model, Path(folder), fill_parameters) for _ in range(repeats if engine != "zero3" else 0)]
    ratios = [ours / plain for ours, plain in timings]
    return {**found, "ratio": statistics.median(ratios) if ratios else None}


def _refill(model: torch.nn.Module, folder: Path, fill: Any) -> tuple[float, float]:
    """Seconds of filling a model from the warm page cache, and of reading the same bytes plainly."""
    reader = CountingReader(folder)
    _together()
    started = time.process_time()
    fill(model, reader, seed=0)
    seconds = time.process_time() - started
    _together()
    return seconds, reader.read_plainly()


def _together() -> None:
    """Ranks share the machine's cores: all of them fill, then all of them read."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _local(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the synthetic checkpoint")
    parser.add_argument("--dim", type=int, default=1536, help="width of the model: t2v-1.3b's; ti2v-5b has 3072")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        total = write_checkpoint(Path(folder) / "model", arguments.gib, dim=arguments.dim)
        print(f"a checkpoint of {total / GIB:.2f} GiB in {NUM_FILES} files; MiB of the worst rank")
        print("| engine, ranks | shard | read | anonymous memory | of shard | largest tensor | time, of plain |")
        print("|---|---|---|---|---|---|---|")
        for engine, size in LAYOUTS:
            rows = run_ranks(load, size, f"{folder}/model", arguments.repeats, engine=engine, timeout_seconds=1200)
            print(_row(f"{engine}, {size}", rows))
    return 0


def _row(name: str, rows: list[dict[str, Any]]) -> str:
    worst = max(rows, key=lambda row: row["held_bytes"])
    shown = [f"{worst[key] / 2**20:.0f}" for key in ("local_bytes", "read_bytes", "held_bytes")]
    shown += [f"{worst['held_bytes'] / worst['local_bytes']:.2f}", f"{worst['largest_bytes'] / 2**20:.0f}"]
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return f"| {name} | {' | '.join([*shown, f'{max(ratios):.2f}' if ratios else 'not compared'])} |"


if __name__ == "__main__":
    sys.exit(main())
