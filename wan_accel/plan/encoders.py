"""Encoders that training runs itself (`data.on_the_fly`): their weights on a rank, and what encoding a video takes."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_accel.draws import Bucket
from wan_accel.models.checkpoint_files import read_encoder
from wan_accel.models.encoder_sizes import build_text_encoder, build_vae21, build_vae22
from wan_accel.models.encoders import VideoVae
from wan_accel.models.variants import TEXT_ENCODER_FILE, Variant
from wan_accel.plan.formula import BF16, FP32
from wan_accel.plan.memory import TrackMemory
from wan_accel.plan.shaped import gpu_operators


def encoder_bytes(kinds: Collection[str], variant: Variant, checkpoint: Path, world_size: int) -> int:
    """Weights on a rank: the VAE whole in fp32, umT5 in bf16 split over all ranks."""
    size = 0
    if {"video", "known"} & set(kinds):
        size += FP32 * _count(_vae(variant, checkpoint))
    if "text" in kinds:
        size += -(-BF16 * _count(_text_encoder(checkpoint)) // world_size)
    return size


def encoding_bytes(kinds: Collection[str], variant: Variant, checkpoint: Path, bucket: Bucket, num_samples: int) -> int:
    """What encoding the videos of a micro-batch adds at its peak; before the forward pass, so without activations."""
    if not {"video", "known"} & set(kinds):
        return 0
    memory, model = TrackMemory(), _vae(variant, checkpoint)
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_operators(), torch.no_grad():
        model.to_empty(device="cpu")
        vae = VideoVae(model, variant)
        frames = torch.empty(num_samples, 3, bucket.num_frames, bucket.height, bucket.width)
        with memory:
            vae.encode(frames)
    return memory.peak.total() + FP32 * frames.numel()


def _vae(variant: Variant, checkpoint: Path) -> Any:
    build, default = (build_vae21, VideoVAE_) if variant.vae.name == "wan2.1" else (build_vae22, VideoVAE38_)
    return _build(checkpoint / variant.vae.file, build, lambda: default(z_dim=variant.vae.latent_channels))


def _text_encoder(checkpoint: Path) -> Any:
    return _build(checkpoint / TEXT_ENCODER_FILE, build_text_encoder, WanTextEncoder)


def _build(file: Path, build: Any, default: Any) -> nn.Module:
    """On meta: by the shapes of its file where it is there, otherwise as released."""
    with torch.device("meta"):
        if not file.is_file():
            return default()
        return build({name: tuple(tensor.shape) for name, tensor in read_encoder(file).items()})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
