"""wan-accel trains the Wan2.2 video diffusion models with Accelerate, DeepSpeed and the Hugging Face Trainer.

Names are loaded on first use, so that importing the package (or its data contract) loads no torch.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "LatentsDataset": "wan_accel.data.latents",
    "StepPlan": "wan_accel.step_plan",
    "WanDenoiser": "wan_accel.models.denoiser",
    "WanTrainer": "wan_accel.trainer",
    "WanTrainingArguments": "wan_accel.arguments",
    "fsdp2_plugin": "wan_accel.parallel.plugins",
    "get_variant": "wan_accel.models.variants",
    "inject_lora": "wan_accel.lora",
    "inject_ulysses": "wan_accel.models.denoiser",
    "load_recipe": "wan_accel.recipe.load",
    "load_wan": "wan_accel.models.loading",
    "zero3_plugin": "wan_accel.parallel.plugins",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
