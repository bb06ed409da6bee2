"""Write a tiny DiT as an original-layout checkpoint folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from synthetic import tiny_denoiser


def write_checkpoint(folder: Path, variant: str, *, num_files: int = 2) -> Path:
    """Two safetensors files with an index and a config.json with the number of heads."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in tiny_denoiser(variant).state_dict().items()}
    names = sorted(state)
    weight_map = {}
    for number in range(num_files):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = names[number::num_files]
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"num_heads": 8}))
    return folder


def tiny_state(variant: str) -> dict[str, torch.Tensor]:
    return tiny_denoiser(variant).state_dict()
