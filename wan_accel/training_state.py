"""What a checkpoint of a plain, DDP or FSDP2 run holds of the model and its optimizer."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

# Frozen base weights of a LoRA run are in the released checkpoint already.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained weights and optimizer state of a plain, DDP or FSDP2 model, by name; no copies. Collective."""
    return {
        "model": get_model_state_dict(model, options=_OPTIONS),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_OPTIONS),
    }


def load_weights(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what was saved of `training_state`, on any number of ranks. Collective."""
    path = str(folder / "model")
    state = _only_stored(training_state(model, optimizer), path)
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
