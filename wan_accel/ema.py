"""An exponential moving average of the trained weights: kept in fp32, saved, restored and swapped in for validation.

checkpoint-<step>/ema/
  .metadata *.distcp       torch.distributed.checkpoint of {"ema": {name: tensor}}, names as in the manifest
  ema.json                 decay, update_every, optimizer steps a tensor has seen
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerCallback

from wan_accel.parallel.names import Engine, is_zero
from wan_accel.stored_tensors import ReadTensor, dcp_tensors

if TYPE_CHECKING:
    from wan_accel.arguments import WanTrainingArguments

FOLDER = "ema"
_STATE = "ema.json"
EmaDevice = Literal["accelerator", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSettings:
    """ema = d * ema + (1 - d) * weight every `update_every` optimizer steps; d rises to `decay` (`decay_after`).

    device: `accelerator` keeps 4 bytes a trained weight on the GPU (divided by the shards), `cpu` in host memory,
        for a copy from the GPU at every update.
    """

    decay: float
    update_every: int = 1
    device: EmaDevice = "accelerator"

    def decay_after(self, num_updates: int) -> float:
        """d of the next update after `num_updates`: min(decay, (1 + n) / (10 + n)), as tf.train's moving average."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """Averages of a model's trained parameters, sharded as they are.

    Args:
        model: the unwrapped model, its weights loaded; under ZeRO with an initialised DeepSpeed engine.
        settings: decay and place.
        engine: the model's. Under ZeRO an average is one of the equal parts, one a rank, of the optimizer's flattened
            and padded fp32 masters. Collective there: it makes a process group.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings, *, engine: Engine = "single") -> None:
        self.settings = settings
        self.model = model
        self.engine = engine
        self._parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = torch.device("cpu") if settings.device == "cpu" else None
        self.shadow: dict[str, Tensor] = {
            name: value.to(device=device or value.device, dtype=torch.float32, copy=True)
            for name, value in self._live_tensors().items()
        }
        self.steps = dict.fromkeys(self.shadow, 0)

    def _live_tensors(self) -> dict[str, Tensor]:
        """The weights as tensors that torch.distributed.checkpoint understands: whole or DTensors."""
        if not is_zero(self.engine):
            return {name: parameter.detach() for name, parameter in self._parameters.items()}
        device_type = next(iter(self._parameters.values())).device.type
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        return {name: DTensor.from_local(self._current(name), mesh, [Shard(0)]) for name in self._parameters}

    def _current(self, name: str) -> Tensor:
        """This rank's part of a weight. Under ZeRO-2 collective."""
        parameter = self._parameters[name]
        if self.engine == "zero2":
            return _equal_part(parameter)
        if self.engine == "zero3":
            from deepspeed.utils import safe_get_local_fp32_param

            return safe_get_local_fp32_param(parameter)
        return _local(parameter.detach())

    @torch.no_grad()
    def update(self, names: Collection[str] | None = None) -> None:
        """Take an optimizer step into the average.

        Args:
            names: parameters that the optimizer has stepped, all by default; the others and their counts stay.
        """
        due: dict[float, list[str]] = {}
        for name in self.shadow if names is None else names:
            self.steps[name] += 1
            if self.steps[name] % self.settings.update_every == 0:
                num_updates = self.steps[name] // self.settings.update_every - 1
                due.setdefault(self.settings.decay_after(num_updates), []).append(name)
        for decay, group in due.items():
            self._move(group, 1 - decay)

    def _move(self, names: Sequence[str], share: float) -> None:
        """Move averages a share of the way to their weights; of those that lie elsewhere one copy is made at a time."""
        averages, weights = [], []
        for name in names:
            average, weight = _local(self.shadow[name]), self._current(name)
            if (weight.device, weight.dtype) == (average.device, average.dtype):
                averages.append(average)
                weights.append(weight)
            else:
                average.lerp_(weight.to(average), share)
        if averages:
            torch._foreach_lerp_(averages, weights, share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the model, and the weights back afterwards, bit for bit. Collective."""
        self._put_averages()
        try:
            yield
        finally:
            self._put_weights_back()

    def _put_averages(self) -> None:
        if is_zero(self.engine):
            for name, parameter in self._parameters.items():
                average = self.shadow[name].to(parameter.device)
                assert isinstance(average, DTensor)
                _set_forward(parameter, average.full_tensor())
        else:
            self._exchange()

    def _put_weights_back(self) -> None:
        if is_zero(self.engine):  # the forward weights are a rounded copy of the masters, which were not touched
            from deepspeed.utils import safe_get_full_fp32_param

            for parameter in self._parameters.values():
                _set_forward(parameter, safe_get_full_fp32_param(parameter))
        else:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap weights and averages in place; both are fp32, so doing it twice changes nothing."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is still gathered would not see its new shards
        for name, average in self.shadow.items():
            weight, average = self._current(name), _local(average)
            assert weight.dtype == average.dtype, f"{name} is trained in {weight.dtype}"
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Any]:
        """The averages for torch.distributed.checkpoint, to be written to a checkpoint's folder `ema`; no copies."""
        return {"ema": self.shadow}

    def write_counts(self, folder: Path) -> None:
        """Write a checkpoint's ema/ema.json."""
        counts = {"decay": self.settings.decay, "update_every": self.settings.update_every, "steps": self.steps}
        (folder / FOLDER).mkdir(exist_ok=True)  # another rank may have begun to write its part there
        (folder / FOLDER / _STATE).write_text(json.dumps(counts))

    def load(self, folder: Path) -> None:
        """Load what was written, on any number of ranks (the same number under ZeRO). Collective.

        Raises:
            ValueError: the checkpoint has no average.
        """
        path = folder / FOLDER
        if not (path / _STATE).is_file():
            raise ValueError(
                f"{folder} has no moving average but the recipe asks for one: remove method.ema to go on without it, "
                "or start a new run from the exported weights"
            )
        self.steps = json.loads((path / _STATE).read_text())["steps"]
        dcp.load({"ema": self.shadow}, checkpoint_id=str(path), no_dist=not dist.is_initialized())


def start_ema(args: "WanTrainingArguments", model: nn.Module, *, engine: Engine) -> Ema | None:
    """The average that the arguments ask for, None without one; `model` as for `Ema`."""
    if not args.ema_decay:
        return None
    settings = EmaSettings(decay=args.ema_decay, update_every=args.ema_update_every, device=args.ema_device)
    return Ema(model, settings, engine=engine)


class EmaCallback(TrainerCallback):
    """Updates a trainer's average after every optimizer step, before gradients are cleared."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.stepped_names())


def ema_tensors(folder: Path, shapes: Mapping[str, list[int]]) -> ReadTensor:
    """Read a checkpoint's averages one at a time, on one process: name -> fp32 tensor of the given shape.

    Raises:
        ValueError: the checkpoint has no average, or a damaged one.
    """
    path = folder / FOLDER
    if not (path / _STATE).is_file():
        raise ValueError(f"{folder} has no moving average: train with method.ema, or leave --ema out")
    read = dcp_tensors(path, "ema")
    # Under ZeRO they are written flat, padded to equal slices.
    return lambda name: read(name).flatten()[: _numel(shapes[name])].view(shapes[name])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _numel(shape: Collection[int]) -> int:
    return torch.Size(shape).numel()


def _equal_part(parameter: Any) -> Tensor:
    """This rank's part of a ZeRO-2 parameter's fp32 master, whose own cut goes through whole groups. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter).flatten()
    size = -(-master.numel() // dist.get_world_size())
    part = master.new_zeros(size)
    mine = master[size * dist.get_rank() :][:size]
    part[: mine.numel()] = mine
    return part


@torch.no_grad()
def _set_forward(parameter: Any, value: Tensor) -> None:
    """Give a ZeRO parameter's forward copy a value that every rank has whole, padded or not. Collective."""
    import deepspeed

    if not hasattr(parameter, "ds_shape"):  # ZeRO-2: every rank has its own
        parameter.copy_(value.flatten()[: parameter.numel()].view(parameter.shape))
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value.flatten()[: parameter.ds_numel].view(parameter.ds_shape))
