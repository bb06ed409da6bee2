"""Timing of a slice: equal losses first, then peer and ours in turns; and the memory that ours needs."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from step_slices import Peer, Slice, first_layers, our_step, peer_step
from torch import Tensor

from wan_accel.models.blocks import CheckpointedModule
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.fp8 import convert_to_fp8
from wan_accel.models.recompute import recompute_of

MAX_LOSS_DIFFERENCE = {False: 0.01, True: 0.05}  # relative, by fp8; weights and inputs are random bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Bytes of our slice: kept by its layers and by what lies around them, and what a step needs beyond its weights
    and those at its peak."""

    layers: float
    around: float
    working: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Medians in seconds of a step of the slice and of its first layers, ours and the peer's."""

    seconds: float
    peer_seconds: float
    shallow_seconds: float
    peer_shallow_seconds: float
    saved: Saved


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


def in_turns(
    peer: Callable[[], object], ours: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of both; a step of the peer, a step of ours, and so on, so that neither has a cooler GPU."""
    times = [(seconds_of(peer, device), seconds_of(ours, device)) for _ in range(repeats)]
    peer_seconds, seconds = (statistics.median(column) for column in zip(*times))
    return peer_seconds, seconds


def saved_by(model: WanDenoiser, inputs: dict[str, Tensor], device: torch.device) -> Saved:
    """Memory that a forward leaves allocated for its backward, and the peak of a step; not numbers on the CPU."""
    if device.type != "cuda":
        return Saved(layers=float("nan"), around=float("nan"), working=float("nan"))
    marks: list[int] = []

    def mark(*_: Any) -> None:
        marks.append(torch.cuda.memory_allocated())

    blocks = model.blocks
    hooks = [blocks[0].register_forward_pre_hook(mark), blocks[-1].register_forward_hook(mark)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = model(**{**inputs, "timestep": inputs["timestep"].float()})
    total = torch.cuda.memory_allocated() - before
    for hook in hooks:
        hook.remove()
    del out
    torch.cuda.reset_peak_memory_stats()
    our_step(model, inputs)
    layers = marks[1] - marks[0]
    working = torch.cuda.max_memory_allocated() - before - total
    return Saved(layers=layers, around=total - layers, working=max(working, 0))


def compare(
    slice_: Slice,
    peer: Peer,
    ours: WanDenoiser,
    inputs: dict[str, Tensor],
    *,
    fp8: bool,
    repeats: int,
    device: torch.device,
) -> Timed:
    """Equal losses first; then peer and ours in turns, whole slices and their first layers.

    Raises:
        RuntimeError: the losses differ.
    """
    expected, found = float(peer_step(peer, inputs)), float(our_step(ours, inputs))
    if not abs(found - expected) <= MAX_LOSS_DIFFERENCE[fp8] * abs(expected):
        raise RuntimeError(f"losses differ: DiffSynth {expected:.6f}, wan-accel {found:.6f}; nothing was timed")
    saved = saved_by(ours, inputs, device)

    def both() -> tuple[float, float]:
        return in_turns(lambda: peer_step(peer, inputs), lambda: our_step(ours, inputs), repeats, device)

    peer_seconds, seconds = both()
    with ExitStack() as stack:
        for model in (peer.dit, ours):
            stack.enter_context(first_layers(model, slice_.shallow))
        peer_step(peer, inputs), our_step(ours, inputs)  # another graph may be compiled here
        peer_shallow_seconds, shallow_seconds = both()
    return Timed(
        seconds=seconds,
        peer_seconds=peer_seconds,
        shallow_seconds=shallow_seconds,
        peer_shallow_seconds=peer_shallow_seconds,
        saved=saved,
    )


def matrix_ceiling(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product on this GPU, here and now."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = statistics.median(seconds_of(lambda: [left @ right for _ in range(10)], device) for _ in range(5))
    return 10 * 2 * 8192**3 / seconds / 1e12
