"""A training step of DiT slices beside DiffSynth's: `python benchmarks/train_step.py`, on one GPU within 10 minutes.

Each row is a slice of 4 layers with random bf16 weights and inputs, forward and backward; peer and ours alternate in
one process and the medians are compared, after their losses have been. Without a GPU it runs tiny slices, to show
that it works: it prints no figures then. Nothing is downloaded. docs/BENCHMARKS.md says what the rows mean.
"""

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor

from wan_accel.flops import Work, step_flops
from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models.blocks import CheckpointedModule
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit
from wan_accel.models.fp8 import convert_to_fp8
from wan_accel.models.recompute import recompute_of
from wan_accel.models.variants import VARIANTS, DitSize

GIB = 2**30
RANK = 32
MAX_LOSS_DIFFERENCE = {False: 0.01, True: 0.05}  # relative, by fp8; weights and inputs are random bf16
GPU_GIB = 80.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Some layers of a variant at one shape of latents (frames, height, width).

    num_gpus: 80 GB GPUs that the shipped recipe is meant for. ulysses: its degree.
    """

    variant: str
    latents: tuple[int, int, int]
    num_gpus: dict[str, int]
    ulysses: int
    num_layers: int = 4

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)


# 81 frames of 480 x 832 with the VAE of Wan2.1, and 121 of 704 x 1280 with that of Wan2.2.
SLICES = (
    Slice(variant="t2v-a14b", latents=(21, 60, 104), num_gpus={"lora": 8, "full": 32}, ulysses=4),
    Slice(variant="ti2v-5b", latents=(31, 44, 80), num_gpus={"lora": 8, "full": 8}, ulysses=1),
)
# Seconds that DiffSynth's online step spends on conditions of one sample: umT5 and VAE, as measured on one H100 with
# torch 2.11 (docs/BENCHMARKS.md); not measured by this script.
ENCODE_SECONDS = {"t2v-a14b": 0.043 + 1.34, "ti2v-5b": 0.043 + 2.26}
CACHED_EPOCHS = 10
# (policy, fp8), the dearest in memory first; out of memory is a row that says so.
WAYS: tuple[tuple[str | float, bool], ...] = (
    ("none", False),
    ("none", True),
    ("attention", False),
    ("attention", True),
    (0.5, False),
    ("full", False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Medians of one way: seconds of a step of the slice, bytes saved between forward and backward, its loss."""

    seconds: float
    peer_seconds: float
    saved_bytes: float
    loss: float


def size_of(row: Slice, tiny: bool) -> DitSize:
    size = replace(VARIANTS[row.variant].dit, num_layers=row.num_layers)
    if not tiny:
        return size
    return replace(size, dim=96, ffn_dim=192, num_layers=2, num_heads=8, freq_dim=32, text_dim=32)


def build(row: Slice, method: str, device: torch.device, tiny: bool) -> tuple[Any, WanDenoiser, dict[str, Tensor]]:
    """The peer's DiT, ours with equal weights, and inputs; adapters of rank 32 where `method` is lora."""
    size, dtype = size_of(row, tiny), torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        peer = build_dit(size).to(dtype)
        for parameter in peer.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        # diffsynth keeps its complex tables on the CPU and copies what a step needs, as its pipeline does.
        peer.freqs = tuple(table.cpu() for table in peer.freqs)
        latents = (2, 4, 8) if tiny else row.latents
        inputs = {
            "hidden_states": torch.randn(1, size.in_dim, *latents, dtype=dtype),
            "timestep": torch.tensor([500.0], dtype=dtype),
            "text": torch.randn(1, 512, size.text_dim, dtype=dtype),
        }
    ours = WanDenoiser(copy.deepcopy(peer))
    if method == "lora":
        for model in (peer, ours):
            inject_lora(model, LoraSettings(r=RANK), VARIANTS[row.variant])
            model.to(dtype)  # as sharded training in bf16 computes with them
        state = dict(peer.named_parameters())
        for name, parameter in ours.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(std=0.02)
                state[name].data.copy_(parameter.data)
    return peer, ours, inputs


def peer_step(peer: Any, inputs: dict[str, Tensor], *, checkpointing: bool = True) -> Tensor:
    """DiffSynth's forward with its gradient checkpointing, and the backward of our loss."""
    out = model_fn_wan_video(
        peer, latents=inputs["hidden_states"], timestep=inputs["timestep"], context=inputs["text"],
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return _finish(peer, out)


def our_step(model: WanDenoiser, inputs: dict[str, Tensor]) -> Tensor:
    return _finish(model, model(**{**inputs, "timestep": inputs["timestep"].float()}))


def _finish(model: Any, out: Tensor) -> Tensor:
    loss = out.float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def prepare(model: WanDenoiser, policy: str | float, fp8: bool, backend: str) -> None:
    """Apply a way to the blocks and throw away what was compiled before."""
    torch._dynamo.reset()
    if fp8:
        convert_to_fp8(model)
    recompute = recompute_of(policy)
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpointing, module.contexts = recompute.checkpointing, recompute.contexts
    compile_blocks(model, num_shapes=1, budget=recompute.budget, backend=backend)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def saved_bytes(model: WanDenoiser, inputs: dict[str, Tensor], device: torch.device) -> float:
    """Memory that a forward leaves allocated for its backward."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = model(**{**inputs, "timestep": inputs["timestep"].float()})
    after = torch.cuda.memory_allocated() - out.numel() * out.element_size()
    del out
    return after - before


def compare(
    peer: Any, ours: WanDenoiser, inputs: dict[str, Tensor], *, fp8: bool, repeats: int, device: torch.device
) -> Timed:
    """Equal losses first; then peer and ours in turns.

    Raises:
        RuntimeError: the losses differ.
    """
    expected, found = float(peer_step(peer, inputs)), float(our_step(ours, inputs))
    if abs(found - expected) > MAX_LOSS_DIFFERENCE[fp8] * abs(expected):
        raise RuntimeError(f"losses differ: DiffSynth {expected:.6f}, wan-accel {found:.6f}; nothing was timed")
    saved = saved_bytes(ours, inputs, device)
    times = [
        (seconds_of(lambda: peer_step(peer, inputs), device), seconds_of(lambda: our_step(ours, inputs), device))
        for _ in range(repeats)
    ]
    peer_seconds, seconds = (statistics.median(column) for column in zip(*times))
    return Timed(seconds=seconds, peer_seconds=peer_seconds, saved_bytes=saved, loss=found)


def matrix_ceiling(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product on this GPU, here and now."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = statistics.median(seconds_of(lambda: [left @ right for _ in range(10)], device) for _ in range(5))
    return 10 * 2 * 8192**3 / seconds / 1e12


def full_model_gib(row: Slice, method: str, saved_a_layer: float) -> float:
    """GiB a GPU of the whole model: sharded weights and their training state, a gathered layer, what layers save.

    LoRA: 2 bytes a frozen weight. Full: 16 bytes a weight (fp32 master, gradient, two moments). A layer is gathered in
    bf16 with its gradient, twice because the next one is fetched ahead. Activations are divided by the Ulysses degree.
    """
    size = VARIANTS[row.variant].dit
    layer = 8 * size.dim**2 + 2 * size.dim * size.ffn_dim
    weights = size.num_layers * layer * (2 if method == "lora" else 16) / row.num_gpus[method]
    gathered = 2 * layer * (2 if method == "lora" else 4)
    return (weights + gathered + size.num_layers * saved_a_layer / row.ulysses) / GIB


def rows(
    row: Slice, method: str, policies: list[str], *, device: torch.device, tiny: bool, repeats: int, deadline: float
) -> list[dict[str, Any]]:
    """Every way of a slice; `deadline` by the monotonic clock."""
    found = []
    backend = "aot_eager_decomp_partition" if tiny else "inductor"
    for policy, fp8 in [way for way in WAYS if str(way[0]) in policies]:
        name = {"variant": row.variant, "method": method, "policy": policy, "fp8": fp8}
        if time.monotonic() > deadline:
            found.append({**name, "note": "left out: no time"})
            print(json.dumps(found[-1]), flush=True)
            continue
        peer, ours, inputs = build(row, method, device, tiny)
        try:
            prepare(ours, policy, fp8, backend)
            timed = compare(peer, ours, inputs, fp8=fp8, repeats=repeats, device=device)
        except torch.OutOfMemoryError:
            found.append({**name, "note": "out of memory"})
        except RuntimeError as error:  # the losses differ, or this way does not run here: the others go on
            found.append({**name, "note": str(error)})
        else:
            found.append({**name, **({"note": "ran"} if tiny else figures(row, method, timed))})
        finally:
            del peer, ours, inputs
            gc.collect()  # compiled blocks hold themselves in cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(json.dumps(found[-1]), flush=True)
    return found


def figures(row: Slice, method: str, timed: Timed) -> dict[str, Any]:
    work = Work(lora_rank=RANK if method == "lora" else None)
    flops = step_flops(size_of(row, tiny=False), row.num_tokens, work)
    saved = timed.saved_bytes / row.num_layers
    needed = full_model_gib(row, method, saved)
    layers, encode = VARIANTS[row.variant].dit.num_layers / row.num_layers, ENCODE_SECONDS[row.variant]
    job = (layers * timed.peer_seconds + encode) / (layers * timed.seconds + encode / CACHED_EPOCHS)
    return {
        "ms": round(1e3 * timed.seconds, 1),
        "diffsynth_ms": round(1e3 * timed.peer_seconds, 1),
        "ratio": round(timed.peer_seconds / timed.seconds, 3),
        "tflops": round(flops / timed.seconds / 1e12, 1),
        "saved_gib_a_layer": round(saved / GIB, 3),
        "full_model_gib": round(needed, 1),
        "fits_80_gib": needed < GPU_GIB,
        "whole_job_ratio_with_quoted_encoders": round(job, 3),
        "num_gpus": row.num_gpus[method],
        "ulysses": row.ulysses,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=[row.variant for row in SLICES])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--policies", nargs="+", default=list(dict.fromkeys(str(policy) for policy, _ in WAYS)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="rows that would start later are left out")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    tiny = not torch.cuda.is_available()
    device = torch.device("cpu" if tiny else "cuda")
    deadline = time.monotonic() + 60 * arguments.minutes
    about = {"device": "cpu" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__}
    about["date"] = time.strftime("%Y-%m-%d")
    if tiny:
        print("no GPU: tiny slices, to show that every way runs; no figures are claimed")
    else:
        about["matrix_tflops"] = f"{matrix_ceiling(device):.0f}"
    print(json.dumps(about), flush=True)
    found = [
        line
        for row in SLICES
        for method in arguments.methods
        if row.variant in arguments.variants
        for line in rows(
            row, method, arguments.policies, device=device, tiny=tiny, repeats=arguments.repeats, deadline=deadline
        )
    ]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**about, "rows": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
