"""One point of `benchmarks/scaling.py`, on every rank of a launch: the real trainer on random weights and data."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from step_slices import RANK, SLICES, TINY_LATENTS, Slice, size_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from wan_accel import WanTrainer, WanTrainingArguments
from wan_accel.assemble import Techniques, assemble
from wan_accel.draws import Bucket, DatasetIndex, SampleDraw
from wan_accel.lora import LoraSettings
from wan_accel.models.dit import build_dit
from wan_accel.models.variants import TEXT_LENGTH
from wan_accel.parallel.cpu import enable_fsdp_on_cpu
from wan_accel.parallel.engine import launched_engine
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.replicas import launched_replicas

NUM_WARMUPS = 3
# What profilers call collectives: kernels of NCCL; without a GPU, calls.
_COLLECTIVES = ("ncclDevKernel", "ncclKernel", "c10d::", "gloo:")


class RandomReader:
    """Weights of a slice in the place of a checkpoint's: the same values on every rank, whatever part it reads."""

    def __init__(self, slice_: Slice, *, tiny: bool) -> None:
        self.folder, self.adapter, size = Path("random"), {}, size_of(slice_, tiny)
        with torch.device("meta"):
            self.shapes = {name: tuple(tensor.shape) for name, tensor in build_dit(size).state_dict().items()}
        self.num_heads = size.num_heads

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        shape = self.shapes[name]
        width = shape[-1] if shape else 1
        row = torch.linspace(-1, 1, width, dtype=torch.bfloat16) * width**-0.5
        whole = row.reshape(shape[-1:]).expand(shape)
        return whole if rows is None else whole[rows]

    def read_into(self, name: str, target: Tensor, rows: slice | None = None) -> None:
        target.copy_(self.read(name, rows).reshape(target.shape))


class RandomSource:
    """Samples of one shape, without a disk."""

    keys: Mapping[str, str] = {}

    def __init__(self, slice_: Slice, size: Any, num_rows: int, *, tiny: bool) -> None:
        self.slice_, self.size, self.num_rows = slice_, size, num_rows
        self.shape = (size.out_dim, *(TINY_LATENTS if tiny else slice_.latents))
        self.text_length = 16 if tiny else TEXT_LENGTH

    def index(self) -> DatasetIndex:
        stride_t, stride_h, stride_w = self.slice_.row.vae.stride
        _, frames, height, width = self.shape
        bucket = Bucket((frames - 1) * stride_t + 1, height * stride_h, width * stride_w)
        return DatasetIndex(buckets=(bucket,) * self.num_rows, num_known=(0,) * self.num_rows)

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        latents = torch.zeros(self.shape, dtype=torch.bfloat16).fill_(0.1 * index)
        text = torch.zeros(self.text_length, self.size.text_dim, dtype=torch.bfloat16)
        return {"latents": latents, "noise": torch.ones(self.shape), "text": text}


class _Timer(TrainerCallback):
    """Seconds of each step after the warm-up; of the last one, which is profiled, the share of collectives.

    The GPU's queue is run empty at both ends of a step. What hides behind computation counts as communication too.
    """

    def __init__(self, last_step: int) -> None:
        self.seconds: list[float] = []
        self.communication = 0.0
        self._last_step, self._started = last_step, 0.0
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._last_step - 1:
            self._profile.start()
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = _now() - self._started
        if state.global_step == self._last_step:
            self._profile.stop()
            self.communication = self._in_collectives() / seconds
        elif state.global_step > NUM_WARMUPS:
            self.seconds.append(seconds)

    def _in_collectives(self) -> float:
        events = [event for event in self._profile.key_averages() if event.key.startswith(_COLLECTIVES)]
        return sum(max(event.self_device_time_total, event.self_cpu_time_total) for event in events) / 1e6


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time `options.steps` optimizer steps and profile one more; the row of this layout. Collective."""
    enable_fsdp_on_cpu()
    slice_ = next(one for one in SLICES if one.variant == options.variant)
    tiny = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer, timer = _trainer(options, slice_, folder, tiny=tiny)
        trainer.train()
    seconds, samples = statistics.median(timer.seconds), trainer.args.global_batch
    tokens = samples * slice_.row.num_tokens(*trainer.plan.index.buckets[0])
    return {
        "engine": trainer.engine, "gpus": trainer.args.world_size, "ulysses": options.ulysses, "mode": options.mode,
        "samples": samples, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "communication": timer.communication, "device": "cpu" if tiny else torch.cuda.get_device_name(),
    }  # fmt: skip


def _trainer(options: argparse.Namespace, slice_: Slice, folder: str, *, tiny: bool) -> tuple[WanTrainer, _Timer]:
    engine, size = launched_engine(), size_of(slice_, tiny)
    args = WanTrainingArguments(
        output_dir=folder, max_steps=NUM_WARMUPS + options.steps + 1, learning_rate=1e-4, logging_strategy="no",
        save_strategy="no", disable_tqdm=True, use_cpu=tiny and engine != "zero3", ulysses=options.ulysses,
        bf16=not tiny, ddp_backend="gloo" if tiny and engine != "single" else None,
    )  # fmt: skip
    dims = ParallelDims(world_size=args.world_size, ulysses=options.ulysses, dp_replicate=launched_replicas())
    # Weak: every group of ranks gets as many samples as one GPU has alone. Strong: all of them together.
    args.global_batch = options.samples * (dims.num_data_ranks if options.mode == "weak" else 1)
    lora = LoraSettings(r=RANK) if options.method == "lora" else None
    techniques = Techniques(
        lora=lora, torch_dtype=torch.float32 if tiny or lora is None else torch.bfloat16, compile=not tiny,
        activation_checkpointing="attention",
    )  # fmt: skip
    reader: Any = RandomReader(slice_, tiny=tiny)
    model = assemble(slice_.row, reader, techniques, engine=engine, dims=dims, device=args.device)
    source: Any = RandomSource(slice_, size, max(args.global_batch, 1), tiny=tiny)
    timer = _Timer(args.max_steps)
    expert = slice_.row.experts[-1].name
    trainer = WanTrainer(
        model, args, source, variant=slice_.row, expert=expert, lora=lora, base="random", callbacks=[timer]
    )
    return trainer, timer


def write(row: dict[str, Any], out: Path) -> None:
    """Append a row to a file of JSON lines."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
