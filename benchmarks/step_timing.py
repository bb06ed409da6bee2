"""Timing of a slice: what it computes first, then peer and ours in turns; and the memory that ours needs."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from step_slices import Peer, Slice, first_layers, our_step, our_velocity, peer_step
from torch import Tensor

from wan_accel.models.blocks import CheckpointedModule
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.fp8 import convert_to_fp8
from wan_accel.models.recompute import recompute_of

MAX_LOSS_DIFFERENCE = {False: 0.01, True: 0.02}  # DiffSynth's and ours, relative, by fp8; all is random, in bf16
# With fp8 and without, relative. On the CPU, tiny slices and slices 1536 wide show up to 0.011 and 0.0015. Products
# that are wrong by a fifth show 0.035 and more in the velocity; the loss may stay as it is.
MAX_FP8_GAPS = {"velocity": 0.03, "loss": 0.01}


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
    out = our_velocity(model, inputs)
    total = torch.cuda.memory_allocated() - before
    for hook in hooks:
        hook.remove()
    del out
    torch.cuda.reset_peak_memory_stats()
    our_step(model, inputs)
    layers = marks[1] - marks[0]
    working = torch.cuda.max_memory_allocated() - before - total
    return Saved(layers=layers, around=total - layers, working=max(working, 0))


def fp8_gaps(plain: Tensor, found: Tensor) -> dict[str, float]:
    """How far velocity and loss with fp8 are from `plain` ones, relative to these.

    Raises:
        RuntimeError: further than fp8's rounding explains, or not at all, so that nothing was computed in fp8.
    """
    plain, found = plain.float(), found.float()
    losses = [float(x.square().mean()) for x in (plain, found)]
    gaps = {
        "velocity": float((found - plain).norm() / plain.norm()),
        "loss": abs(losses[1] - losses[0]) / losses[0],
    }
    if not gaps["velocity"]:
        raise RuntimeError("the velocity with fp8 is that without, to the last bit: nothing was computed in fp8")
    for name, most in MAX_FP8_GAPS.items():
        if not gaps[name] <= most:
            raise RuntimeError(f"fp8: the {name} is {gaps[name]:.1%} off, at most {most:.1%} is rounding; not timed")
    return gaps


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
