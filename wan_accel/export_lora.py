"""Write a trained LoRA in the layouts of the tools that load it.

Every layout but peft's has the factor alpha / r folded into lora_B, because tools differ in where they look for it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from wan_accel.lora_files import PEFT_CONFIG, PEFT_FILE, LoraLayer
from wan_accel.models.layouts import diffusers_modules

# Layout -> name of a tensor; {half} is A or B.
_NAMES = {
    "diffsynth": "{module}.lora_{half}.default.weight",
    "comfyui": "diffusion_model.{module}.lora_{half}.weight",
    "diffusers": "transformer.{module}.lora_{half}.weight",
    "peft": "base_model.model.{module}.lora_{half}.weight",
}
LORA_LAYOUTS = tuple(_NAMES)
Pairs = dict[str, tuple[Tensor, Tensor]]


def folded(layers: Mapping[str, LoraLayer], dtype: torch.dtype | None) -> Pairs:
    """Module -> (lora_A (r, in), lora_B (out, r)) with the scale in lora_B, in the dtype that is written."""
    return {
        name: (
            layer.down.to(dtype or layer.down.dtype),
            (layer.up.float() * layer.scale).to(dtype or layer.up.dtype),
        )
        for name, layer in layers.items()
    }


def write_lora(path: Path, layout: str, pairs: Pairs, metadata: Mapping[str, str]) -> None:
    """Write a file of a layout that has the scale in its tensors.

    Raises:
        ValueError: the layout has no names for some of the layers.
    """
    if layout == "diffusers":
        pairs = _diffusers_pairs(pairs)
    state = {
        _NAMES[layout].format(module=module, half=half): tensor.contiguous()
        for module, pair in pairs.items()
        for half, tensor in zip("AB", pair)
    }
    save_file(state, path, metadata=dict(metadata))


def _diffusers_pairs(pairs: Pairs) -> Pairs:
    """Under diffusers' names; a layer that it splits by rows has lora_A in both and lora_B's rows apart."""
    renamed: Pairs = {}
    unknown = []
    for module, (down, up) in pairs.items():
        names = diffusers_modules(module)
        if names is None:
            unknown.append(module)
            continue
        renamed |= {name: (down.clone(), rows) for name, rows in zip(names, up.chunk(len(names)))}
    if unknown:
        raise ValueError(
            f"layout diffusers has no names for {len(unknown)} of {len(pairs)} layers, e.g. {unknown[0]}: use "
            "diffsynth, comfyui or peft"
        )
    return renamed


def write_peft(
    folder: Path,
    layers: Mapping[str, LoraLayer],
    *,
    rank: int,
    alpha: float,
    base: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained` on a model with the original names."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        _NAMES["peft"].format(module=module, half=half): tensor.to(dtype or tensor.dtype).contiguous()
        for module, layer in layers.items()
        for half, tensor in zip("AB", (layer.down, layer.up))
    }
    save_file(state, folder / PEFT_FILE, metadata=dict(metadata))
    lora_alpha = int(alpha) if alpha == int(alpha) else alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # peft annotates an int and computes with any number
        target_modules=sorted(layers),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    content = {**config.to_dict(), "target_modules": sorted(layers)}
    (folder / PEFT_CONFIG).write_text(json.dumps(content, indent=2, default=str) + "\n")
