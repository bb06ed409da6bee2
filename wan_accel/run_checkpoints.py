"""A trainer's checkpoints: what is saved of it, and how it goes on from one (files: `wan_accel.checkpoint`)."""

import logging
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerState
from transformers.training_args import OptimizerNames

from wan_accel import checkpoint, ema
from wan_accel.checkpoint import Manifest
from wan_accel.checkpoint_writer import Job, can_be_copied, host_bytes
from wan_accel.optimizer_settings import put_settings, resume_schedule, settings_of
from wan_accel.parallel.names import is_zero
from wan_accel.training_state import load_weights, training_state

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer

logger = logging.getLogger("wan_accel")
_HOST_SHARE = 0.8  # of free host memory may be used for a checkpoint's copies
_SKIPPED = "skipped_steps"  # in trainer_state.json, beside the state of callbacks
# Arguments that decide, beside the data, which samples a step has and what its loss is.
_RUN_SETTINGS = (
    "seed", "global_batch", "global_batch_tokens", "batch_multiple_of", "density", "shift", "logit_mean", "logit_std",
    "mode_scale", "weighting", "caption_dropout", "face_dropout", "image_dropout",
)  # fmt: skip


def save_checkpoint(trainer: "WanTrainer", model: nn.Module) -> None:
    """Start to write a checkpoint beside the others (`wan_accel.checkpoint_writer`); the last is complete. Collective.

    DeepSpeed writes its own before this returns.
    """
    started, step = time.perf_counter(), trainer.state.global_step
    is_sharded = trainer.engine == "fsdp2" or is_zero(trainer.engine)
    folder = checkpoint.start(trainer.output_dir, step)
    parts = {} if trainer.ema is None else {ema.FOLDER: trainer.ema.state()}
    if is_zero(trainer.engine):
        for expert, engine in _engines(trainer).items():
            engine.save_checkpoint(str(checkpoint.zero_folder(folder, expert)), exclude_frozen_parameters=True)
    else:
        parts["model"] = training_state(model, _plain_optimizer(trainer))
    trainer._save_rng_state(str(folder))
    if trainer.args.should_save:
        _write_small_files(trainer, folder)
    manifest, keep = manifest_of(trainer, step), trainer.args.save_total_limit
    job = Job(folder=folder, manifest=manifest, parts=parts, keep=keep, sharded=is_sharded)
    trainer.writer.write(job, beside=not is_zero(trainer.engine) and _can_stage(trainer, job))
    seconds = time.perf_counter() - started
    trainer._logged.save_seconds += seconds
    _say(trainer, f"checkpoint-{step}: training waited {seconds:.2f} s for it", level=logging.INFO)


def _write_small_files(trainer: "WanTrainer", folder: Path) -> None:
    assert trainer.lr_scheduler is not None
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    callbacks: Any = trainer.state.stateful_callbacks  # a dictionary once the state is made
    callbacks[_SKIPPED] = trainer.guard.num_skipped
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    if trainer.ema is not None:
        trainer.ema.write_counts(folder)
    if (recipe := trainer.output_dir / "recipe.yaml").is_file():  # so that a checkpoint is whole by itself
        shutil.copyfile(recipe, folder / recipe.name)


def _can_stage(trainer: "WanTrainer", job: Job) -> bool:
    """Whether to copy a checkpoint to host memory, so that training goes on while it is written."""
    if not trainer.args.async_save or not can_be_copied(dict(job.parts)):  # the latter: an 8-bit optimizer's state
        return False
    needed = host_bytes(dict(job.parts)) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available
    if needed > _HOST_SHARE * free:
        logger.warning(
            "%s is written while training waits: its copies need %.1f GiB of host memory on this machine, of which "
            "%.1f GiB are free. More machines divide it; training.async_save: false says so from the start",
            job.folder.name, needed / 2**30, free / 2**30,
        )  # fmt: skip
        return False
    return True


def manifest_of(trainer: "WanTrainer", step: int) -> Manifest:
    """What a checkpoint of a trainer at a step says of itself."""
    lora = None
    if trainer.lora is not None:
        lora = {
            "r": trainer.lora.r,
            "lora_alpha": trainer.lora.lora_alpha,
            "target_modules": list(trainer.lora.target_modules),
        }
    return Manifest(
        engine=trainer.engine,
        step=step,
        variant=trainer.variant.name,
        expert=trainer.expert,
        method="full" if trainer.lora is None else "lora",
        base=trainer.base,
        lora=lora,
        world_size=trainer.args.world_size,
        ulysses=trainer.args.ulysses,
        trained=trained_shapes(trainer),
        data=asdict(trainer.data) if trainer.data is not None else None,
        settings=_settings(trainer),
    )


def trained_shapes(trainer: "WanTrainer") -> dict[str, list[int]]:
    """Names of trained tensors, and their whole shapes."""
    return {
        # Under ZeRO-3 a parameter is empty on its own and keeps its shape beside.
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trainer.accelerator.unwrap_model(trainer.module).named_parameters()
        if parameter.requires_grad
    }


def _settings(trainer: "WanTrainer") -> dict[str, Any]:
    held_out = len({draw.index for draw in trainer.eval_draws})
    return {
        "optim": OptimizerNames(trainer.args.optim).value,
        **{name: getattr(trainer.args, name) for name in _RUN_SETTINGS},
        "held_out_rows": held_out,
    }


def _plain_optimizer(trainer: "WanTrainer") -> torch.optim.Optimizer:
    optimizer = trainer.optimizer
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert optimizer is not None
    return optimizer


def _engines(trainer: "WanTrainer") -> dict[str, Any]:
    """DeepSpeed's engine of each expert."""
    return trainer.lanes


def resume(trainer: "WanTrainer", folder: Path, model: nn.Module) -> None:
    """Load weights and the state of optimizer and schedule, whose settings stay the recipe's. Collective.

    Raises:
        ValueError: the checkpoint was written by an engine of the other family, or trains something else.
    """
    saved, current = checkpoint.read_manifest(folder), manifest_of(trainer, 0)
    check_same_run(folder, saved, current)
    if problem := checkpoint.other_data(folder, saved, current):
        _say(trainer, problem)
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    settings = settings_of(trainer.optimizer)
    if is_zero(trainer.engine):
        _load_engines(trainer, folder)
    else:
        load_weights(folder, model, _plain_optimizer(trainer))
    if trainer.ema is not None:
        trainer.ema.load(folder)
    callbacks: Any = TrainerState.load_from_json(str(folder / "trainer_state.json")).stateful_callbacks
    trainer.guard.num_skipped = callbacks.get(_SKIPPED, 0)
    changes = [*_differences(saved, current), *put_settings(trainer.optimizer, settings)]
    schedule = torch.load(folder / "scheduler.pt", weights_only=True)
    changes += resume_schedule(trainer.lr_scheduler, schedule, trainer.optimizer)
    if changes:
        _say(trainer, f"resumed from {folder.name} with other settings of the recipe: {'; '.join(changes)}")


def check_same_run(folder: Path, saved: Manifest, current: Manifest) -> None:
    """Check that a checkpoint's weights and state are those of the run that is to go on from it.

    Raises:
        ValueError: they are another engine's, model's or optimizer's.
    """
    if saved.engine != current.engine and (is_zero(saved.engine) or is_zero(current.engine)):
        raise ValueError(
            f"{folder} was written by {saved.engine} and cannot be resumed with {current.engine}: "
            f"resume with {saved.engine}, or export its weights and start a new run from them"
        )
    for field in ("variant", "expert", "method", "lora", "trained"):
        if getattr(saved, field) != getattr(current, field):
            raise ValueError(f"{folder} trains another {field} than this recipe: use another output_dir or recipe")
    before, now = ((one.settings or {}).get("optim") for one in (saved, current))
    if before is not None and now is not None and before.removesuffix("_fused") != now.removesuffix("_fused"):
        raise ValueError(
            f"{folder} holds the state of training.optim={before}, which {now} cannot go on from: resume with "
            f"{before}, or export the weights and start a new run from them"
        )
    if is_zero(saved.engine) and saved.world_size != current.world_size:
        raise ValueError(
            f"{folder} was written by {saved.world_size} {saved.engine} processes and cannot be resumed on "
            f"{current.world_size}: start {saved.world_size}"
        )


def _differences(saved: Manifest, current: Manifest) -> list[str]:
    """`name: old -> new` of what the recipe now says otherwise; a run may go on with it, but not unnoticed."""
    before, now = ({"base": one.base, **(one.settings or {})} for one in (saved, current))
    return [f"{name}: {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]


def _load_engines(trainer: "WanTrainer", folder: Path) -> None:
    for expert, engine in _engines(trainer).items():
        place = checkpoint.zero_folder(folder, expert)
        loaded, _ = engine.load_checkpoint(str(place), load_module_strict=False)
        if loaded is None:  # DeepSpeed only warns
            raise ValueError(f"{place} is damaged or not complete: resume from another checkpoint of the run")


def _say(trainer: "WanTrainer", message: str, level: int = logging.WARNING) -> None:
    """Once for all ranks; the others keep it in their files."""
    logger.log(level if trainer.is_world_process_zero() else logging.INFO, message)
