"""Checkpoints of runs as the trainer leaves them, of made-up tensors, and what their weights compute."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from wan_accel.checkpoint import MANIFEST, Manifest
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.loading import load_wan

RANK, ALPHA = 4, 8.0
TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip
# fp32 in other orders of operations, on outputs of about 3.
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}


def modules(num_blocks: int) -> list[str]:
    return [f"blocks.{block}.{target}" for block in range(num_blocks) for target in TARGETS]


def lora_tensors(base: dict[str, Tensor], modules: list[str], seed: int = 0) -> dict[str, Tensor]:
    """A trained LoRA by the names that it has in a model."""
    generator = torch.Generator().manual_seed(seed)
    trained = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        for half, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            trained[f"{module}.lora_{half}.default.weight"] = torch.randn(shape, generator=generator) * 0.1
    return trained


def write_run(
    run: Path,
    base: Path,
    variant: str,
    trained: dict[str, Tensor],
    *,
    method: str = "lora",
    engine: str = "single",
    expert: str = "default",
    ema: dict[str, Tensor] | None = None,
    recipe: str | None = None,
) -> Path:
    """Write `checkpoint-7` of a run; returns the run's folder."""
    checkpoint = run / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    if engine == "zero3":
        for name in ("high", "low") if expert == "both" else (expert,):
            prefix = f"{name}." if expert == "both" else ""
            part = {key.removeprefix(prefix): tensor for key, tensor in trained.items() if key.startswith(prefix)}
            write_zero(checkpoint / "zero" / name, part)
    else:
        dcp.save({"model": trained}, checkpoint_id=str(checkpoint / "model"), no_dist=True)
    if ema is not None:
        write_ema(checkpoint, ema)
    manifest = Manifest(
        engine=engine, step=7, variant=variant, expert=expert, method=method, base=str(base),
        lora={"r": RANK, "lora_alpha": ALPHA, "target_modules": []} if method == "lora" else None,
        world_size=1, ulysses=1, trained={name: list(tensor.shape) for name, tensor in trained.items()},
    )  # fmt: skip
    (checkpoint / MANIFEST).write_text(json.dumps(asdict(manifest)))
    if recipe is not None:
        (run / "recipe.yaml").write_text(recipe)
    return run


def write_ema(checkpoint: Path, ema: dict[str, Tensor]) -> None:
    """Moving averages of what a checkpoint holds."""
    dcp.save({"ema": ema}, checkpoint_id=str(checkpoint / "ema"), no_dist=True)
    (checkpoint / "ema" / "ema.json").write_text("{}")


def write_zero(folder: Path, trained: dict[str, Tensor], num_ranks: int = 2) -> None:
    """The files of DeepSpeed's ZeRO-3 that weights are read from: each rank has an equal part of every tensor."""
    (folder / "step").mkdir(parents=True)
    (folder / "latest").write_text("step")
    parts = {name: torch.nn.functional.pad(t.flatten(), (0, -t.numel() % num_ranks)) for name, t in trained.items()}
    for rank in range(num_ranks):
        flat = torch.cat([part.chunk(num_ranks)[rank] for part in parts.values()])
        masters = {"zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": [flat]}
        shapes = [{name: tensor.shape for name, tensor in trained.items()}]
        rest = {"buffer_names": [], "module": {}, "param_shapes": shapes, "shared_params": {}, "ds_version": "0"}
        stem = folder / "step" / f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": masters}, f"{stem}_optim_states.pt")
        torch.save(rest, f"{stem}_model_states.pt")


def with_lora(
    variant: str, base: Path, trained: dict[str, Tensor], *, expert: str | None = None, motion: bool = False
) -> WanDenoiser:
    """Our denoiser with W + alpha / r * B @ A in its weights."""
    model = load_wan(variant, base, expert=expert, with_motion_encoder=motion)
    for name, down in trained.items():
        if ".lora_A." in name:
            up = trained[name.replace(".lora_A.", ".lora_B.")]
            model.get_parameter(f"{name.split('.lora_')[0]}.weight").data += ALPHA / RANK * up @ down
    return model
