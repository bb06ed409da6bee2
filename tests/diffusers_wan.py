"""diffusers' own Wan transformers at tiny size, random weights, and what they compute."""

from pathlib import Path
from typing import Any

import torch
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from torch import Tensor

TEXT_DIM, CLIP_DIM, NUM_HEADS, HEAD_DIM = 24, 40, 8, 12
SIZES: dict[str, Any] = {
    "num_attention_heads": NUM_HEADS,
    "attention_head_dim": HEAD_DIM,
    "ffn_dim": 128,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
}
ANIMATE_SIZES: dict[str, Any] = {
    "image_dim": CLIP_DIM,
    "added_kv_proj_dim": NUM_HEADS * HEAD_DIM,
    "motion_encoder_channel_sizes": {str(2**power): 2 for power in range(2, 10)},
    "motion_style_dim": 24,
    "motion_encoder_dim": 24,
    "face_encoder_hidden_dim": 8,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that let every input reach the output; those of the motion encoder scale themselves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 1.0 if "motion_encoder" in name else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * std + (parameter.ndim == 1)


def wan_transformer(seed: int = 0) -> WanTransformer3DModel:
    model = WanTransformer3DModel(**SIZES, num_layers=2)
    randomise(model, seed)
    return model.eval()


def animate_transformer(seed: int = 0) -> WanAnimateTransformer3DModel:
    """Five blocks and one face block: diffusers has a face block for every whole five."""
    model = WanAnimateTransformer3DModel(**SIZES, **ANIMATE_SIZES, num_layers=5)
    randomise(model, seed)
    return model.eval()


def save_repository(folder: Path, variant: str) -> dict[str, WanTransformer3DModel]:
    """The transformers of a diffusers repository, in several files each; expert -> transformer."""
    if variant == "animate-14b":
        models = {"default": animate_transformer()}
    elif variant == "t2v-a14b":
        models = {"high": wan_transformer(0), "low": wan_transformer(1)}
    else:
        models = {"default": wan_transformer()}
    for name, model in zip(("transformer", "transformer_2"), models.values()):
        model.save_pretrained(folder / name, max_shard_size="200KB")
    return models


def wan_inputs() -> dict[str, Tensor]:
    """Arguments of our denoiser; text of 512 tokens, as diffusers counts on."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([900.0, 37.5]),
        "text": torch.randn(2, 512, TEXT_DIM, generator=generator),
    }


def animate_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 512, TEXT_DIM, generator=generator),
        "condition": torch.randn(1, 20, 2, 4, 6, generator=generator),
        "clip_features": torch.randn(1, 257, CLIP_DIM, generator=generator),
        "pose_latents": torch.randn(1, 16, 1, 4, 6, generator=generator),
        "face_pixel_values": torch.rand(1, 3, 1, 512, 512, generator=generator) * 2 - 1,
    }


@torch.no_grad()
def diffusers_output(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a diffusers transformer says to the denoiser's arguments."""
    hidden = inputs["hidden_states"]
    arguments: dict[str, Any] = {
        "hidden_states": torch.cat([hidden, inputs["condition"]], dim=1) if "condition" in inputs else hidden,
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["text"],
    }
    if "clip_features" in inputs:
        arguments |= {
            "encoder_hidden_states_image": inputs["clip_features"],
            "pose_hidden_states": inputs["pose_latents"],
            "face_pixel_values": inputs["face_pixel_values"],
        }
    return model(**arguments, return_dict=False)[0]


def load_into(transformer: torch.nn.Module, path: Path) -> None:
    """What `pipe.load_lora_weights(path)` does."""
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, transformer, adapter_name="x", metadata=metadata)
