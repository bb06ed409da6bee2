"""FSDP2: shard a denoiser from the fields of accelerate's plugin."""

from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import Variant
from wan_accel.parallel.settings import REFUSED

# The classes of `shard_units`. Motion encoders are sharded where they are kept.
_UNITS, _ADAPTER_UNITS, _MOTION_UNITS = ("WanBlock",), ("WanFaceBlock", "FaceEncoder"), ("Generator",)


def fully_shard_denoiser(model: WanDenoiser, plugin: FullyShardedDataParallelPlugin, mesh: DeviceMesh) -> WanDenoiser:
    """Shard every block, face block and the rest (the root) over `mesh`, in place.

    Works on the meta device (fill the parameters afterwards) and on materialised parameters that are equal on
    all ranks. All-gathers and reduce-scatters then run over the mesh's shard axis; gradients are averaged over
    all of its ranks, in the policy's reduce dtype.

    Raises:
        ValueError: the plugin asks for something that is not honoured here.
    """
    _refuse_unhonoured(plugin)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": mixed_precision_policy(plugin),
        "offload_policy": _offload_policy(plugin, mesh),
    }
    for unit in shard_units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    """Whether parameters, gradients and optimizer state stay in host memory (fsdp_offload_params)."""
    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def _offload_policy(plugin: FullyShardedDataParallelPlugin, mesh: DeviceMesh) -> OffloadPolicy:
    """The plugin's; CPU ranks have no accelerator to pin memory for."""
    if offloads(plugin) and mesh.device_type == "cpu":
        return CPUOffloadPolicy(pin_memory=False)
    return plugin.cpu_offload


def shard_units(model: WanDenoiser) -> list[nn.Module]:
    """The modules gathered one at a time; what is left belongs to the root."""
    units: list[nn.Module] = list(model.transformer_blocks)
    if model.has_adapter:
        units += [*model.face_adapter.fuser_blocks, model.face_encoder]
        if hasattr(model, "motion_encoder"):
            units.append(model.motion_encoder)
    return units


def shard_unit_classes(variant: Variant, *, with_motion_encoder: bool = False) -> list[str]:
    """Names of the classes of `shard_units`, by which accelerate wraps."""
    units = [*_UNITS, *(_ADAPTER_UNITS if variant.has_animate_adapter else ())]
    return [*units, *_MOTION_UNITS] if variant.has_animate_adapter and with_motion_encoder else units


def mixed_precision_policy(plugin: FullyShardedDataParallelPlugin) -> MixedPrecisionPolicy:
    """The plugin's dtypes with fp32 gradient reduction, and without casting inputs.

    The denoiser casts its inputs itself: a cast at the root would round the timestep to bf16.
    """
    policy = plugin.mixed_precision_policy
    if policy is None or policy.param_dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _refuse_unhonoured(plugin: FullyShardedDataParallelPlugin) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} is not supported: set fsdp_version: 2 in the accelerate config"
        )
    for row in REFUSED:
        value = getattr(plugin, row.attribute) if row.attribute is not None else None
        if value:
            raise ValueError(f"fsdp_{row.attribute}={value!r} is not honoured here: {row.advice}")


def assert_sharded(model: nn.Module) -> None:
    """Check that a model launched under FSDP2 really holds sharded parameters.

    Raises:
        RuntimeError: it does not, so every rank would hold a full copy.
    """
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if not isinstance(model, FSDPModule) or plain:
        raise RuntimeError(
            f"FSDP2 was asked for but {len(plain)} parameters are not sharded (first: {plain[:1]}); "
            "pass the model to WanTrainer, or through fully_shard_denoiser, under an FSDP2 accelerate config"
        )


def num_local_elements(model: nn.Module) -> int:
    """Parameter elements that this rank holds."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
