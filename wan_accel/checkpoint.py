"""Checkpoints of a run: written beside, renamed when complete, loaded on any number of ranks (FSDP2 and DDP).

checkpoint-<step>/
  manifest.json            format, engine, step, what is trained; written last
  model/                   torch.distributed.checkpoint: trained weights and optimizer (single, DDP, FSDP2)
  zero/<expert>/           DeepSpeed's own format (ZeRO-3)
  ema/                     moving averages of the trained weights, if the run keeps them (wan_accel.ema)
  trainer_state.json  scheduler.pt  rng_state*.pth  recipe.yaml
"""

import dataclasses
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from wan_accel.disk import free_bytes
from wan_accel.ema import ema_tensors
from wan_accel.models.variants import BOTH
from wan_accel.parallel.engine import Engine
from wan_accel.stored_tensors import ReadTensor, dcp_tensors, zero_tensors

FORMAT = "wan-accel/checkpoint@1"
MANIFEST = "manifest.json"
# Frozen base weights of a LoRA run are in the released checkpoint already.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


# fp32 weights and AdamW's two moments; the rest of a checkpoint is small.
_BYTES_PER_ELEMENT = 12
_EMA_BYTES_PER_ELEMENT = 4


class NoSpaceError(ValueError):
    """The disk cannot hold another checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds. `trained` maps names of trained tensors to shapes.

    data: digest of the rows that it was trained on. settings: what else decides the samples, the loss and their order.
    Both are None in checkpoints of versions before they were recorded.
    """

    engine: Engine
    step: int
    variant: str
    expert: str
    method: str
    base: str
    lora: dict[str, Any] | None
    world_size: int
    ulysses: int
    trained: dict[str, list[int]]
    data: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    format: str = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: the folder is no complete checkpoint, or one of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint (no {MANIFEST}): choose another one of the same run")
    fields = json.loads(path.read_text())
    if fields.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {fields.get('format')!r}, this version reads {FORMAT!r}")
    known = {field.name for field in dataclasses.fields(Manifest)}  # a later version may add what we can do without
    return Manifest(**{name: value for name, value in fields.items() if name in known})


def other_data(folder: Path, saved: Manifest, current: Manifest) -> str | None:
    """What to say where a checkpoint was trained on other rows than those that there are now; None for the same."""
    if saved.data is None or current.data is None or saved.data == current.data:
        return None
    return (
        f"the data changed since {folder} was written ({saved.data['rows']} rows then, {current.data['rows']} now; "
        f"clips, captions, data.where or weights): training goes on, with other samples from step {saved.step} on "
        "than without the stop"
    )


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / MANIFEST).is_file()]
    return sorted((p for p in found if p.name.split("-")[-1].isdigit()), key=lambda p: int(p.name.split("-")[-1]))


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none."""
    checkpoints = complete_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest complete one of a run.

    Raises:
        ValueError: neither.
    """
    found = path if (path / MANIFEST).is_file() else last_checkpoint(path)
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint: give a run's output_dir or a checkpoint-N folder")
    return found


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def check_space(output_dir: Path, trained: dict[str, list[int]], *, has_ema: bool = False) -> None:
    """Check that the disk holds a checkpoint of these tensors, before anything is written.

    Raises:
        NoSpaceError: it does not. Checkpoints that are there already are untouched.
    """
    bytes_per_element = _BYTES_PER_ELEMENT + _EMA_BYTES_PER_ELEMENT * has_ema
    needed = bytes_per_element * sum(math.prod(shape) for shape in trained.values())
    free = free_bytes(output_dir)
    if needed > free:
        raise NoSpaceError(
            f"training.output_dir={output_dir}: a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB "
            "are free. Free some and run the same command again: it goes on from the newest complete checkpoint"
        )


def start(output_dir: Path, step: int, *, is_main: bool) -> Path:
    """Create the empty folder that a checkpoint is written to before it is renamed. Collective."""
    folder = output_dir / f"checkpoint-{step}.tmp"
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier()
    return folder


def commit(folder: Path, manifest: Manifest, *, keep: int | None, is_main: bool) -> Path:
    """Rename a written checkpoint into place, then delete the oldest beyond `keep`. Collective.

    The newest complete checkpoint is never deleted, whatever `keep` says.
    """
    barrier()  # every rank has written its part
    final = folder.with_name(folder.name.removesuffix(".tmp"))
    if is_main:
        (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
        _sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)  # the same step saved again, e.g. after a resume
        folder.rename(final)
        for old in complete_checkpoints(final.parent)[: -max(keep, 1)] if keep else []:
            shutil.rmtree(old)
    barrier()
    return final


def _sync_folder(folder: Path) -> None:
    """Flush every file to disk, so that the rename does not outlive its content."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save_weights(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write trained weights and optimizer state of a plain, DDP or FSDP2 model. Collective."""
    dcp.save(_state(model, optimizer), checkpoint_id=str(folder / "model"), no_dist=not dist.is_initialized())


def load_weights(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `save_weights` wrote, on any number of ranks. Collective."""
    path = str(folder / "model")
    state = _only_stored(_state(model, optimizer), path)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"], options=_OPTIONS)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)


def _only_stored(state: dict[str, Any], path: str) -> dict[str, Any]:
    """Leave out optimizer state that was not saved: an expert which no step had used yet has none."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "optimizer.state."
    names = sorted(name for name in state["optimizer"]["state"])
    kept = [name for name in names if any(key.startswith(f"{prefix}{name}.") for key in stored)]
    moments = {name: state["optimizer"]["state"][name] for name in kept}
    return {**state, "optimizer": {**state["optimizer"], "state": moments}}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=_OPTIONS),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_OPTIONS),
    }


def zero_folder(folder: Path, expert: str) -> Path:
    """Where an expert's engine writes; engines of a pair do not share a folder."""
    return folder / "zero" / expert


def open_trained(folder: Path, manifest: Manifest, *, ema: bool = False) -> ReadTensor:
    """Read a checkpoint's trained tensors one at a time, on one process: name in the manifest -> fp32 tensor.

    Args:
        folder: a complete checkpoint.
        manifest: the folder's.
        ema: read their moving averages instead of the weights (of which engines' fp32 masters are read).

    Raises:
        ValueError: the checkpoint is damaged, or has no moving average.
    """
    if ema:
        return ema_tensors(folder, manifest.trained)
    if manifest.engine != "zero3":
        return dcp_tensors(folder / "model", "model")
    if manifest.expert != BOTH:
        return zero_tensors({"": zero_folder(folder, manifest.expert)})
    experts = sorted({name.split(".")[0] for name in manifest.trained})
    return zero_tensors({f"{expert}.": zero_folder(folder, expert) for expert in experts})


def read_trained(folder: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's trained tensors whole; see `open_trained`."""
    manifest = read_manifest(folder)
    read = open_trained(folder, manifest, ema=ema)
    return {name: read(name) for name in manifest.trained}
