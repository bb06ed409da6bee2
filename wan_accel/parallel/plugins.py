"""accelerate's plugins for a loop of the user's own: `accelerator.prepare(model, optimizer)` then shards a WanDenoiser.

Both are to be made before the `Accelerator`. Launched with an accelerate config they have its fields, otherwise those
of recipes/accelerate/fsdp2.yaml and zero3.yaml; the precision is the Accelerator's.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from wan_accel.models.variants import get_variant
from wan_accel.parallel.config_checks import refuse_launched
from wan_accel.parallel.cpu import enable_fsdp_on_cpu
from wan_accel.parallel.fsdp import mixed_precision_policy, shard_unit_classes
from wan_accel.parallel.replicas import resolve_launched
from wan_accel.recipe.load import recipes_folder

_FSDP_FIELDS = {"fsdp_version": "fsdp_version", "fsdp_reshard_after_forward": "reshard_after_forward",
                "fsdp_offload_params": "cpu_offload"}  # fmt: skip
_ZERO_FIELDS = ("zero_stage", "zero3_init_flag", "offload_optimizer_device", "offload_param_device")
_FSDP_MARK, _ZERO_MARKS = "FSDP_VERSION", ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE")


@dataclass
class WanFsdpPlugin(FullyShardedDataParallelPlugin):
    """accelerate's plugin, whose bf16 keeps what has to be exact.

    accelerate 1.15 reduces gradients in bf16 and casts the inputs of every unit, the timestep among them.
    """

    def set_mixed_precision(self, mixed_precision: Any, buffer_autocast: bool = False, override: bool = False) -> None:
        """Compute in `mixed_precision` and reduce gradients in fp32; accelerate calls this with the Accelerator's."""
        super().set_mixed_precision(mixed_precision, buffer_autocast, override=True)
        self.mixed_precision_policy = mixed_precision_policy(self)


def fsdp2_plugin(variant: str, *, with_motion_encoder: bool = False) -> WanFsdpPlugin:
    """The plugin with which `accelerator.prepare(model, optimizer)` shards a `WanDenoiser` block by block.

    Give `prepare` the whole model, the same on all ranks, with LoRA and `inject_ulysses` applied, and an optimizer made
    from it: accelerate maps the optimizer's parameters by their address, which shards of its own would not have. Its
    units are those of `fully_shard_denoiser`; only the root stays gathered from forward to backward.

    Args:
        variant: a name of the variants table.
        with_motion_encoder: the model keeps Animate's motion encoder.

    Raises:
        ValueError: no such variant, or the launcher's config asks for another engine or for what is not honoured.
    """
    row = get_variant(variant)
    _refuse_other("fsdp2_plugin", "ACCELERATE_USE_DEEPSPEED", _ZERO_MARKS, "FSDP")
    refuse_launched(has_recipe=False)
    enable_fsdp_on_cpu()
    if not torch.accelerator.is_available():
        # Not told so, accelerate 1.15 sets up no distribution on CPUs: each process would train a model of its own.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    resolve_launched()
    units = shard_unit_classes(row, with_motion_encoder=with_motion_encoder)
    return launched_fsdp2(auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=units)


def launched_fsdp2(**fields: Any) -> WanFsdpPlugin:
    """The plugin with `fields` and those of the launcher's environment, or of the shipped config without one."""
    if _FSDP_MARK not in os.environ:
        shipped = _shipped("fsdp2", "fsdp_config")
        fields |= {name: shipped[key] for key, name in _FSDP_FIELDS.items()}
    plugin = WanFsdpPlugin(**fields)
    plugin.mixed_precision_policy = mixed_precision_policy(plugin)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        plugin.set_mixed_precision(precision)
    return plugin


def zero3_plugin(variant: str, *, max_grad_norm: float = 0.0) -> DeepSpeedPlugin:
    """The plugin with which `accelerator.prepare(model, optimizer)` makes a ZeRO-3 engine of a `WanDenoiser`.

    The batch size that DeepSpeed insists on is 1, a formality: it does not scale losses by it.

    Args:
        variant: a name of the variants table.
        max_grad_norm: DeepSpeed clips gradients to it inside `accelerator.backward`, where
            `accelerator.clip_grad_norm_` only tells the norm; 0: not at all. `gradient_clipping` of the launcher's
            config takes its place.

    Raises:
        ValueError: no such variant, or the launcher's config asks for another engine or for what is not honoured.
    """
    get_variant(variant)
    _refuse_other("zero3_plugin", "ACCELERATE_USE_FSDP", (_FSDP_MARK,), "DEEPSPEED")
    refuse_launched(has_recipe=False)
    fields: dict[str, Any] = {}
    if not any(mark in os.environ for mark in _ZERO_MARKS):
        shipped = _shipped("zero3", "deepspeed_config")
        fields = {name: shipped[name] for name in _ZERO_FIELDS}
    plugin = DeepSpeedPlugin(**fields)
    if plugin.get_value("gradient_clipping") in (None, "auto"):
        # Where nothing is said accelerate 1.15 (`_prepare_deepspeed`) and DeepSpeed 0.19 both clip to 1.0.
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    if plugin.zero_stage != 3:
        raise ValueError(f"zero3_plugin: the launcher's config has zero_stage={plugin.zero_stage}: use 3")
    if plugin.get_value("train_micro_batch_size_per_gpu") in (None, "auto"):
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    return plugin


def _shipped(name: str, section: str) -> dict[str, Any]:
    return yaml.safe_load((recipes_folder() / "accelerate" / f"{name}.yaml").read_text())[section]


def _refuse_other(name: str, other: str, marks: tuple[str, ...], engine: str) -> None:
    """Refuse to make a plugin in a job that was launched with the other engine's config."""
    if os.environ.get(other, "false").lower() == "true" and any(mark in os.environ for mark in marks):
        raise ValueError(f"{name}: this job was launched with another engine: use distributed_type: {engine}")
