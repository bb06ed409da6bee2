"""Tokens per second, TFLOP/s and MFU of a rank between two log lines."""

import logging

import torch

from wan_accel.flops import Work, peak_tflops, step_flops
from wan_accel.lora import LoraSettings
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import DitSize

logger = logging.getLogger(__name__)


def size_of(model: WanDenoiser) -> DitSize:
    """A denoiser's sizes, from its modules: a tiny checkpoint of a variant has others than the released one."""
    block, patch = model.transformer_blocks[0], model.patch_size
    head = model.head.head
    return DitSize(
        dim=model.num_heads * model.head_dim,
        ffn_dim=block.ffn[0].out_features,  # type: ignore[index]
        num_layers=len(model.blocks),
        num_heads=model.num_heads,
        in_dim=model.patch_embedding.in_channels,
        out_dim=head.out_features // (patch[0] * patch[1] * patch[2]),
        clip_dim=1280 if block.has_image else None,
        patch_size=(patch[0], patch[1], patch[2]),
    )


class Throughput:
    """Counts a rank's samples; a rank of a Ulysses group has the group's share of them."""

    def __init__(self, model: WanDenoiser, lora: LoraSettings | None, *, ulysses: int, device: torch.device) -> None:
        self.size = size_of(model)
        self.work = Work(
            lora_rank=None if lora is None else lora.r,
            has_face_blocks=model.has_adapter,
            text_length=model.text_length,
        )
        self.ulysses = ulysses
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak = peak_tflops(name)
        if self.peak is None and device.type == "cuda":
            logger.info("no mfu in this run's log: %s has no row in PEAK_TFLOPS of wan_accel/flops.py", name)
        self.tokens = self.flops = 0.0

    def add(self, latents: torch.Size) -> None:
        """Count a micro-batch with latents (B, C, F, h, w)."""
        batch, _, frames, height, width = latents
        patch_t, patch_h, patch_w = self.size.patch_size
        tokens = frames * height * width // (patch_t * patch_h * patch_w)
        self.tokens += batch * tokens / self.ulysses
        self.flops += batch * step_flops(self.size, tokens, self.work) / self.ulysses

    def take(self, seconds: float) -> dict[str, float]:
        """What was counted since the last call, per second and GPU; MFU only where the GPU's peak is known."""
        tflops = self.flops / seconds / 1e12
        logs = {"tokens_per_second_per_gpu": round(self.tokens / seconds, 1), "tflops_per_gpu": round(tflops, 4)}
        if self.peak is not None:
            logs["mfu"] = round(tflops / self.peak, 4)
        self.tokens = self.flops = 0.0
        return logs
