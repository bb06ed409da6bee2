"""From what was measured on a slice to what is claimed: memory of the whole model, TFLOP/s, the whole job."""

import functools
from typing import Any

import torch
from step_slices import RANK, Slice, size_of
from step_timing import Saved, Timed

from wan_accel.assemble import Techniques
from wan_accel.flops import Work, step_flops
from wan_accel.lora import LoraSettings
from wan_accel.models.variants import VARIANTS
from wan_accel.optimizers import DEFAULT_OPTIM
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.plan.ask import units_of_skeleton
from wan_accel.plan.formula import Load, StepMemory, Trained, peak_of
from wan_accel.plan.layout import Layout
from wan_accel.plan.verdict import GIB, Budget
from wan_accel.plan.weights import Unit, released_shapes

GPU_GIB = 80.0
CACHED_EPOCHS = 10


def figures(
    slice_: Slice,
    method: str,
    policy: str | float,
    timed: Timed,
    encoders: dict[str, float] | str,
    *,
    matrix_tflops: float,
) -> dict[str, Any]:
    """A row's fields (docs/BENCHMARKS.md).

    Args:
        encoders: their seconds, or why there are none.
        matrix_tflops: of a large bf16 product in the same run.
    """
    work = Work(
        lora_rank=RANK if method == "lora" else None, has_face_blocks=slice_.row.has_animate_adapter
    )
    flops = step_flops(size_of(slice_, tiny=False), slice_.num_tokens, work)
    num_gpus = slice_.num_gpus[method]
    needed = full_model_gib(slice_, method, policy, timed.saved, ulysses=slice_.ulysses)
    return {
        "ms": round(1e3 * timed.seconds, 1),
        "diffsynth_ms": round(1e3 * timed.peer_seconds, 1),
        "ratio": round(timed.peer_seconds / timed.seconds, 3),
        "tflops": round(flops / timed.seconds / 1e12, 1),
        "of_matrix_tflops": round(flops / timed.seconds / 1e12 / matrix_tflops, 3),
        "saved_gib_a_layer": round(timed.saved.layers / slice_.num_layers / GIB, 3),
        "full_model_gib": round(needed, 1),
        "num_gpus": num_gpus,
        "ulysses": slice_.ulysses,
        "fits_80_gib": fits(needed),
        "fits_80_gib_from_ulysses": least_ulysses(slice_, method, policy, timed.saved),
        **whole_job(slice_, timed, encoders),
    }


def whole_job(slice_: Slice, timed: Timed, encoders: dict[str, float] | str) -> dict[str, Any]:
    """A step of all layers; with its conditions encoded online by DiffSynth, and once for 10 epochs by us."""
    layers, shallow = slice_.row.dit.num_layers, slice_.shallow
    more = (layers - shallow) / (slice_.num_layers - shallow)
    peer = timed.peer_shallow_seconds + more * (timed.peer_seconds - timed.peer_shallow_seconds)
    ours = timed.shallow_seconds + more * (timed.seconds - timed.shallow_seconds)
    found = {"step_s": round(ours, 3), "diffsynth_step_s": round(peer, 3)}
    if isinstance(encoders, str):
        return {**found, "whole_job_ratio": f"not measured: {encoders}"}
    encode = sum(encoders.values())
    return {
        **found,
        "encode_s": {name: round(seconds, 3) for name, seconds in encoders.items()},
        "whole_job_ratio": round((peer + encode) / (ours + encode / CACHED_EPOCHS), 3),
    }


def full_model_gib(slice_: Slice, method: str, policy: str | float, saved: Saved, *, ulysses: int) -> float:
    """GiB a GPU of the whole model at its peak, by the formula of `wan-accel plan` (`wan_accel.plan.formula`).

    What was measured on the slice stands in it for what is traced: what layers and the rest keep, and a layer's working
    memory while it is differentiated, weight gradients of the slice among it, all divided by the Ulysses degree. The
    exchanges' outputs, which a slice on one GPU does not have, come on top. Of the size of latents are six tensors in
    fp32.
    """
    frames, height, width = slice_.latents
    latents = 6 * 4 * slice_.row.dit.out_dim * frames * height * width
    per_layer = saved.layers / slice_.num_layers + exchanged_bytes(slice_, policy, ulysses)
    step = StepMemory(
        layer=per_layer / ulysses, around=saved.around / ulysses + latents, working=saved.working / ulysses
    )
    layout = Layout(engine="fsdp2", world_size=slice_.num_gpus[method], ulysses=ulysses)
    load = Load(num_layers=slice_.row.dit.num_layers, accumulates=True)
    return peak_of(units(slice_.variant, method), layout, Trained(optim=DEFAULT_OPTIM), step, load).total / GIB


@functools.cache
def units(variant: str, method: str) -> tuple[Unit, ...]:
    """The parameters of the released model, with a LoRA's adapters or all of them trained."""
    row, lora = VARIANTS[variant], LoraSettings(r=RANK) if method == "lora" else None
    techniques = Techniques(lora=lora, torch_dtype=torch.bfloat16 if lora else torch.float32)
    return units_of_skeleton(row, released_shapes(row), techniques)


def exchanged_bytes(slice_: Slice, policy: str | float, ulysses: int) -> float:
    """What a layer keeps of Ulysses' exchanges, all ranks of a group together.

    q, k and v after the exchange and attention's output after its own: 4 times the tokens in bf16 where a policy
    keeps them. Without recomputation q, k and v are kept anyway: 2 more, as counted on two CPU ranks.
    """
    if ulysses == 1 or policy == "full":
        return 0.0
    return (2 if policy == "none" else 4) * 2.0 * slice_.num_tokens * slice_.row.dit.dim


def fits(needed_gib: float) -> bool:
    return Budget(memory=GPU_GIB * GIB).holds(needed_gib * GIB)


def least_ulysses(slice_: Slice, method: str, policy: str | float, saved: Saved) -> int | None:
    """The smallest Ulysses degree with which the recipe's GPUs hold the model, None without one."""
    degrees = [n for n in usable_degrees(slice_.row.dit.num_heads) if slice_.num_gpus[method] % n == 0]
    return next((n for n in degrees if fits(full_model_gib(slice_, method, policy, saved, ulysses=n))), None)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The two figures of each slice and method, without and with fp8: ceiling, and the fastest row that fits."""
    lines = []
    timed = [row for row in rows if "ratio" in row]
    for variant, method, fp8 in dict.fromkeys((row["variant"], row["method"], row["fp8"]) for row in timed):
        group = [row for row in timed if (row["variant"], row["method"], row["fp8"]) == (variant, method, fp8)]
        ceiling = next((row["ratio"] for row in group if row["policy"] == "none"), None)
        line = {"variant": variant, "method": method, "fp8": fp8, "ceiling_ratio": ceiling, "deployable_ratio": None}
        fitting = [row for row in group if row["fits_80_gib"]]
        if fitting:
            best = max(fitting, key=lambda row: row["ratio"])
            names = ("policy", "num_gpus", "ulysses", "full_model_gib", "whole_job_ratio")
            line |= {"deployable_ratio": best["ratio"], **{name: best[name] for name in names}}
        lines.append(line)
    return lines
