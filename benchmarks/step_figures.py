"""From what was measured on a slice to what is claimed: memory of the whole model, TFLOP/s, the whole job."""

from typing import Any

from step_slices import RANK, Slice, size_of
from step_timing import Saved, Timed

from wan_accel.flops import FACE_BLOCK_EVERY, Work, step_flops
from wan_accel.models.variants import DitSize
from wan_accel.parallel.degrees import usable_degrees

GIB = 2**30
GPU_GIB = 80.0
# CUDA's context, NCCL's buffers, and what the allocator cannot use.
RESERVED_GIB = 4.0
CACHED_EPOCHS = 10
# FSDP2 reduces gradients in fp32 (`parallel.fsdp.mixed_precision_policy`), a layer at a time: it waits for a layer's
# reduction, and lets go of its buffer, before it fills the next one's.
REDUCE_BYTES = 4


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
    """GiB a GPU of the whole model: weights and their training state, activations, what a layer works with.

    Sharded over all GPUs are the weights: 2 bytes each in LoRA, 16 in full training (fp32 master, gradient, two
    moments), and 16 bytes of an adapter's. Gathered are two layers, the next one being fetched ahead, and the layers
    around the blocks, in bf16. In full training there are gradients of a layer and of those around in bf16, and FSDP2's
    buffer of the layer before in fp32, whose gradients are being summed over the ranks. What was measured on the slice
    (activations, and a layer's working memory while it is differentiated) is divided by the Ulysses degree; the
    exchanges' outputs, which a slice on one GPU does not have, come on top. Of the size of latents are six tensors in
    fp32.
    """
    size, num_gpus = slice_.row.dit, slice_.num_gpus[method]
    layer, around = layer_parameters(size), other_parameters(slice_)
    total = size.num_layers * layer + around
    weights = total * (16 if method == "full" else 2)
    if method == "lora":
        weights += 16 * size.num_layers * RANK * (18 * size.dim + 2 * size.ffn_dim)
    gathered = 2 * (2 * layer + around)
    if method == "full":
        gathered += 2 * (layer + around) + REDUCE_BYTES * layer
    per_layer = saved.layers / slice_.num_layers + exchanged_bytes(slice_, policy, ulysses)
    activations = (size.num_layers * per_layer + saved.around + saved.working) / ulysses
    frames, height, width = slice_.latents
    latents = 6 * 4 * size.out_dim * frames * height * width
    return (weights / num_gpus + gathered + activations + latents) / GIB


def exchanged_bytes(slice_: Slice, policy: str | float, ulysses: int) -> float:
    """What a layer keeps of Ulysses' exchanges, all ranks of a group together.

    q, k and v after the exchange and attention's output after its own: 4 times the tokens in bf16 where a policy
    keeps them. Without recomputation q, k and v are kept anyway: 2 more, as counted on two CPU ranks.
    """
    if ulysses == 1 or policy == "full":
        return 0.0
    return (2 if policy == "none" else 4) * 2.0 * slice_.num_tokens * slice_.row.dit.dim


def layer_parameters(size: DitSize) -> int:
    """Matrices of a block: q, k, v, o twice, k and v of CLIP's tokens, feed-forward."""
    return (10 if size.clip_dim is not None else 8) * size.dim**2 + 2 * size.dim * size.ffn_dim


def other_parameters(slice_: Slice) -> int:
    """Matrices around the blocks: embeddings of text, time, patches and CLIP, head, Animate's face blocks."""
    size = slice_.row.dit
    text_and_time = (size.text_dim + size.freq_dim + 8 * size.dim) * size.dim
    patches = 4 * (size.in_dim + size.out_dim) * size.dim
    clip = 0 if size.clip_dim is None else (size.clip_dim + size.dim) * size.clip_dim
    face = 4 * size.dim**2 * -(-size.num_layers // FACE_BLOCK_EVERY) if slice_.row.has_animate_adapter else 0
    return text_and_time + patches + clip + face


def fits(needed_gib: float) -> bool:
    return needed_gib <= GPU_GIB - RESERVED_GIB


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
