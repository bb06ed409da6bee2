"""LoRA on a denoiser: injection, initial values, and the names of its tensors."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from wan_accel.models.variants import Variant

ADAPTER_NAME = "default"
# Words of `method.target_modules` for groups of layers; `default` is the variant's own.
TARGET_GROUPS = {
    "face": ("linear1_q", "linear1_kv", "linear2"),  # of face_adapter.fuser_blocks (Animate)
    "image": ("cross_attn.k_img", "cross_attn.v_img"),  # the CLIP image branch (Wan2.1 i2v, Animate)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What a LoRA needs; the update is lora_B @ lora_A * lora_alpha / r."""

    r: int = 32
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r


def inject_lora(model: nn.Module, settings: LoraSettings, variant: Variant) -> nn.Module:
    """Freeze `model` and put fp32 adapters on the targets' linear layers.

    `target_modules` are whole names or name suffixes as in peft, or words for groups of them (`expand_targets`). On
    the meta device the adapters are on meta too: fill them with `init_lora` after the model is materialised.

    Raises:
        ValueError: a target matches no layer.
    """
    targets = expand_targets(settings.target_modules, variant)
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _matches(name, targets)
    ]
    missing = [t for t in targets if not any(_matches(name, (t,)) for name in names)]
    if missing:
        raise ValueError(
            f"method.target_modules: {', '.join(missing)} match no linear layer of {variant.name}: "
            f"use names such as {', '.join(variant.lora_targets)}, or {', '.join(['default', *TARGET_GROUPS])}"
        )
    model.requires_grad_(False)
    # peft annotates an int and computes with any number.
    alpha: Any = settings.lora_alpha
    config = LoraConfig(r=settings.r, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
    is_meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=is_meta)
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.requires_grad_(True)
            if not hasattr(parameter, "ds_id"):  # ZeRO-3 keeps fp32 masters in its optimizer instead
                parameter.data = parameter.data.float()
    return model


def expand_targets(targets: tuple[str, ...], variant: Variant) -> tuple[str, ...]:
    """Targets with the words for groups replaced; the variant's default for none."""
    groups = {"default": variant.lora_targets, **TARGET_GROUPS}
    expanded = [part for target in targets or ("default",) for part in groups.get(target, (target,))]
    return tuple(dict.fromkeys(expanded))


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def initial_lora_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Starting value of one adapter tensor, fp32: uniform +-1/sqrt(fan_in) for A (as peft), zeros for B.

    It depends on (seed, name) alone, so every layout of ranks starts from the same adapter.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def base_name(name: str) -> str:
    """A parameter's name before LoRA wrapped its module: `q.base_layer.weight` -> `q.weight`."""
    return name.replace(".base_layer.", ".")
