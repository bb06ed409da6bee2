"""What train_step.py runs: slices of the DiTs with random weights, DiffSynth's and ours with the same, and inputs.

Shapes: B = 1 sample, C latent channels, F latent frames, h x w latent pixels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffsynth.models import wan_video_dit
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor, nn

from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import FACE_BLOCK_EVERY, AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import TEXT_LENGTH, VARIANTS, DitSize, Variant

RANK = 32
TINY_LATENTS = (2, 4, 8)
# Motion vectors are no narrower than the 20 directions that they are made of.
TINY_MOTION: dict[str, Any] = {"motion_channels": (2,) * 8, "motion_dim": 32, "face_width": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Some layers of a variant at one shape of latents (frames, height, width).

    num_gpus: 80 GB GPUs that the shipped recipe is meant for, by method. ulysses: its degree.
    """

    variant: str
    latents: tuple[int, int, int]
    num_gpus: dict[str, int]
    ulysses: int
    num_layers: int = 4

    @property
    def row(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    @property
    def video(self) -> tuple[int, int, int]:
        """Frames, height and width of the video that the latents are of; a reference frame is not of it."""
        frames, height, width = self.latents
        stride_t, stride_h, stride_w = self.row.vae.stride
        return (frames - self.row.reference_frames - 1) * stride_t + 1, height * stride_h, width * stride_w

    @property
    def shallow(self) -> int:
        """Layers of the smaller slice that tells what layers cost from what lies around them.

        With face blocks none: a face block after every fifth layer is then a part of a layer's cost.
        """
        return 0 if self.row.has_animate_adapter else 1


# 81 frames of 480 x 832, 121 of 704 x 1280 with the VAE of Wan2.2, and 77 of 640 x 640 behind a reference frame.
SLICES = (
    Slice(variant="t2v-a14b", latents=(21, 60, 104), num_gpus={"lora": 8, "full": 32}, ulysses=4),
    Slice(variant="ti2v-5b", latents=(31, 44, 80), num_gpus={"lora": 8, "full": 8}, ulysses=1),
    Slice(
        variant="animate-14b",
        latents=(21, 80, 80),
        num_gpus={"lora": 8, "full": 64},
        ulysses=4,
        num_layers=FACE_BLOCK_EVERY,
    ),
)


class CachedMotion(nn.Module):
    """In the place of Animate's motion encoder: it is given motion vectors and returns them.

    DiffSynth runs the encoder once a step, whatever the depth, so its time is measured with the other encoders'.
    """

    def get_motion(self, vectors: Tensor) -> Tensor:
        return vectors.flatten(1)


class Peer(nn.Module):
    """DiffSynth's training forward, with its gradient checkpointing."""

    def __init__(self, dit: nn.Module, adapter: nn.Module | None) -> None:
        super().__init__()
        self.dit, self.adapter = dit, adapter

    def forward(
        self,
        *,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Tensor,
        first_frame_timestep: Tensor | None = None,
        condition: Tensor | None = None,
        clip_features: Tensor | None = None,
        pose_latents: Tensor | None = None,
        motion_vectors: Tensor | None = None,
    ) -> Tensor:
        faces = None if motion_vectors is None else motion_vectors[:, None, :, None]  # as (B, c, T, H, W) pixels
        return model_fn_wan_video(
            self.dit, animate_adapter=self.adapter, latents=hidden_states, timestep=timestep, context=text,
            y=condition, clip_feature=clip_features, pose_latents=pose_latents, face_pixel_values=faces,
            fuse_vae_embedding_in_latents=first_frame_timestep is not None, use_gradient_checkpointing=True,
        )  # fmt: skip


def peer_attention() -> str:
    """The kernel that DiffSynth takes for every attention: the first package that is installed, and no setting."""
    for name, is_there in (
        ("flash_3", wan_video_dit.FLASH_ATTN_3_AVAILABLE),
        ("flash_2", wan_video_dit.FLASH_ATTN_2_AVAILABLE),
        ("sage", wan_video_dit.SAGE_ATTN_AVAILABLE),
    ):
        if is_there:
            return name
    return "sdpa"


def size_of(slice_: Slice, tiny: bool) -> DitSize:
    size = replace(slice_.row.dit, num_layers=slice_.num_layers)
    if not tiny:
        return size
    clip_dim = 40 if size.clip_dim else None
    return replace(size, dim=96, ffn_dim=192, num_heads=8, freq_dim=32, text_dim=32, clip_dim=clip_dim)


def build(
    slice_: Slice, method: str, device: torch.device, tiny: bool
) -> tuple[Peer, WanDenoiser, dict[str, Tensor]]:
    """The peer, ours with equal weights, and inputs; adapters of rank 32 where `method` is lora."""
    size, dtype = size_of(slice_, tiny), torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        peer = Peer(build_dit(size), _animate_adapter(slice_, size, tiny)).to(dtype)
        for name, parameter in peer.named_parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.data += 1  # norms
        inputs = inputs_of(slice_, size, dtype, tiny)
    # diffsynth keeps its complex tables on the CPU and copies what a step needs, as its pipeline does.
    dit: Any = peer.dit
    dit.freqs = tuple(table.cpu() for table in dit.freqs)
    ours = WanDenoiser(copy.deepcopy(dit), copy.deepcopy(peer.adapter))  # type: ignore[arg-type]
    if method == "lora":
        _add_equal_loras(peer, ours, slice_.row, dtype)
    return peer, ours, inputs


def _animate_adapter(slice_: Slice, size: DitSize, tiny: bool) -> nn.Module | None:
    if not slice_.row.has_animate_adapter:
        return None
    options = TINY_MOTION if tiny else {}
    num_face_blocks = -(-size.num_layers // FACE_BLOCK_EVERY)
    adapter = build_animate_adapter(
        AnimateSize(dim=size.dim, num_heads=size.num_heads, num_face_blocks=num_face_blocks, **options)
    )
    adapter.motion_encoder = CachedMotion()
    return adapter


def inputs_of(slice_: Slice, size: DitSize, dtype: torch.dtype, tiny: bool) -> dict[str, Tensor]:
    """What a step is given, on the current default device; ti2v with a clean first frame, as it is trained."""
    frames, height, width = TINY_LATENTS if tiny else slice_.latents

    def rand(*shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=dtype)

    inputs = {
        "hidden_states": rand(size.out_dim, frames, height, width),
        "timestep": torch.tensor([500.0], dtype=dtype),
        "text": rand(TEXT_LENGTH, size.text_dim),
    }
    if slice_.row.fuses_first_frame:
        inputs["first_frame_timestep"] = torch.zeros(1)
    if size.in_dim != size.out_dim:
        inputs["condition"] = rand(size.in_dim - size.out_dim, frames, height, width)
    if size.clip_dim is not None:
        inputs["clip_features"] = rand(257, size.clip_dim)
    if slice_.row.has_animate_adapter:
        inputs["pose_latents"] = rand(16, frames - 1, height, width)
        inputs["motion_vectors"] = rand(4 * (frames - 2) + 1, TINY_MOTION["motion_dim"] if tiny else 512)
    return inputs


def _add_equal_loras(peer: Peer, ours: WanDenoiser, variant: Variant, dtype: torch.dtype) -> None:
    for model in (peer, ours):
        inject_lora(model, LoraSettings(r=RANK), variant)
        model.to(dtype)  # as sharded training in bf16 computes with them
    theirs = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.02)
            theirs[f"dit.{name}"].data.copy_(parameter.data)


def peer_step(peer: Peer, inputs: dict[str, Tensor]) -> Tensor:
    return _finish(peer, peer(**inputs))


def our_velocity(model: WanDenoiser, inputs: dict[str, Tensor]) -> Tensor:
    return model(**{**inputs, "timestep": inputs["timestep"].float()})


def our_step(model: WanDenoiser, inputs: dict[str, Tensor]) -> Tensor:
    return _finish(model, our_velocity(model, inputs))


def _finish(model: nn.Module, out: Tensor) -> Tensor:
    """The backward of one loss for both; a LoRA slice without layers has none."""
    loss = out.float().square().mean()
    if loss.requires_grad:
        loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


@contextmanager
def first_layers(model: Any, num_layers: int) -> Iterator[None]:
    """The model with its first layers only."""
    blocks = model.blocks
    model.blocks = blocks[:num_layers]
    try:
        yield
    finally:
        model.blocks = blocks
