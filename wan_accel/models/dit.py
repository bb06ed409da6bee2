"""diffsynth's DiT and Animate adapter, built at any size; sizes read from a checkpoint's tensor shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffsynth.models.wan_video_animate_adapter import (
    CausalConv1d,
    ConvLayer,
    Direction,
    EqualConv2d,
    EqualLinear,
    FaceAdapter,
    FaceEncoder,
    Generator,
    ResBlock,
    WanAnimateAdapter,
)
from diffsynth.models.wan_video_dit import MLP, WanModel
from torch import nn

from wan_accel.models.variants import DitSize

Shapes = Mapping[str, Sequence[int]]
ADAPTER_PREFIXES = ("pose_patch_embedding.", "motion_encoder.", "face_adapter.", "face_encoder.")
# Every fifth block is followed by a face block (wan/modules/animate/model_animate.py, `after_transformer_block`).
FACE_BLOCK_EVERY = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class AnimateSize:
    """Sizes of the Animate adapter.

    `motion_channels` are the widths of the motion encoder's stages from 512 x 512 pixels down to 4 x 4,
    `motion_dim` the width of a motion vector, `face_width` the inner width of the face encoder.
    """

    dim: int
    num_heads: int
    num_face_blocks: int
    latent_channels: int = 16
    motion_channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_dim: int = 512
    num_motion_directions: int = 20
    face_width: int = 1024
    num_face_heads: int = 4


def build_dit(size: DitSize) -> WanModel:
    """Build a DiT on the current default device (`torch.device("meta")` for a skeleton).

    Its RoPE tables (`dit.freqs`) are plain tensors of diffsynth's own forward; ours does not read them.
    """
    has_clip = size.clip_dim is not None
    dit = WanModel(
        dim=size.dim,
        in_dim=size.in_dim,
        ffn_dim=size.ffn_dim,
        out_dim=size.out_dim,
        text_dim=size.text_dim,
        freq_dim=size.freq_dim,
        eps=size.eps,
        patch_size=size.patch_size,
        num_heads=size.num_heads,
        num_layers=size.num_layers,
        has_image_input=has_clip,
        require_clip_embedding=has_clip,
        # Only ti2v-5b has its 48 latent channels as its whole input; it takes its first frame fused into them.
        require_vae_embedding=size.in_dim != size.out_dim,
        seperated_timestep=size.in_dim == 48,
        fuse_vae_embedding_in_latents=size.in_dim == 48,
    )
    if size.clip_dim is not None and size.clip_dim != 1280:
        dit.img_emb = MLP(size.clip_dim, size.dim)
    return dit


def build_animate_adapter(size: AnimateSize) -> WanAnimateAdapter:
    """Build the Animate adapter at any size from the classes that the released one is made of."""
    adapter = WanAnimateAdapter.__new__(WanAnimateAdapter)  # its __init__ takes no sizes: 5120 wide, 8 face blocks
    nn.Module.__init__(adapter)
    patch = (1, 2, 2)
    adapter.pose_patch_embedding = nn.Conv3d(size.latent_channels, size.dim, kernel_size=patch, stride=patch)
    adapter.motion_encoder = _build_motion_encoder(size)
    adapter.face_adapter = FaceAdapter(size.dim, size.num_heads, num_adapter_layers=size.num_face_blocks)
    adapter.face_encoder = _build_face_encoder(size)
    return adapter


def _build_motion_encoder(size: AnimateSize) -> Generator:
    """The LIA motion encoder; one residual block halves the picture between two neighbouring widths."""
    with torch.device("meta"):
        encoder = Generator(size=512, style_dim=size.motion_dim, motion_dim=size.num_motion_directions)
    channels = size.motion_channels
    stages = [ResBlock(before, after) for before, after in zip(channels, channels[1:])]
    last = EqualConv2d(channels[-1], size.motion_dim, 4, padding=0, bias=False)
    encoder.enc.net_app.convs = nn.ModuleList([ConvLayer(3, channels[0], 1), *stages, last])
    wide = [EqualLinear(size.motion_dim, size.motion_dim) for _ in range(4)]
    encoder.enc.fc = nn.Sequential(*wide, EqualLinear(size.motion_dim, size.num_motion_directions))
    encoder.dec.direction = Direction(size.num_motion_directions)
    if size.motion_dim != 512:
        encoder.dec.direction.weight = nn.Parameter(torch.randn(size.motion_dim, size.num_motion_directions))
    return encoder


def _build_face_encoder(size: AnimateSize) -> FaceEncoder:
    with torch.device("meta"):
        encoder = FaceEncoder(size.motion_dim, size.dim, num_heads=size.num_face_heads)
    width = size.face_width
    encoder.conv1_local = CausalConv1d(size.motion_dim, width * size.num_face_heads, 3, stride=1)
    encoder.conv2 = CausalConv1d(width, width, 3, stride=2)
    encoder.conv3 = CausalConv1d(width, width, 3, stride=2)
    encoder.out_proj = nn.Linear(width, size.dim)
    for norm in ("norm1", "norm2", "norm3"):
        setattr(encoder, norm, nn.LayerNorm(width, elementwise_affine=False, eps=1e-6))
    encoder.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, size.dim))
    return encoder


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """Count the numbered children of `prefix`, e.g. `blocks.` -> number of layers."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def dit_size_from_shapes(shapes: Shapes, *, head_dim: int = 128, num_heads: int | None = None) -> DitSize:
    """Derive a DiT's sizes from its tensor shapes (original names, without a prefix).

    Args:
        shapes: name -> shape of every tensor.
        head_dim: used when `num_heads` is not known; no tensor of a DiT shows its number of heads.
        num_heads: from the checkpoint's config.json.

    Raises:
        ValueError: a tensor that fixes a size is missing.
    """
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        patch_size = (patch[0], patch[1], patch[2])
        out_dim = shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2])
        return DitSize(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_layers=count_blocks(shapes, "blocks."),
            num_heads=num_heads or dim // head_dim,
            in_dim=in_dim,
            out_dim=out_dim,
            freq_dim=shapes["time_embedding.0.weight"][1],
            text_dim=shapes["text_embedding.0.weight"][1],
            clip_dim=shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else None,
            patch_size=patch_size,
        )
    except KeyError as missing:
        raise ValueError(
            f"the checkpoint has no tensor {missing}: this is not a Wan DiT"
        ) from None


def animate_size_from_shapes(shapes: Shapes) -> AnimateSize:
    """Derive the Animate adapter's sizes from its tensor shapes.

    Raises:
        ValueError: a tensor that fixes a size is missing.
    """
    try:
        dim, latent_channels = shapes["pose_patch_embedding.weight"][:2]
        stages = count_blocks(shapes, "motion_encoder.enc.net_app.convs.")
        convs = "motion_encoder.enc.net_app.convs"
        channels = [shapes[f"{convs}.0.0.weight"][0]]
        # Stages 1 .. n-2 are residual blocks: their skip convolution (after the blur) has the new width.
        channels += [shapes[f"{convs}.{stage}.skip.1.weight"][0] for stage in range(1, stages - 1)]
        face_width, motion_dim = (
            shapes["face_encoder.conv2.conv.weight"][0],
            shapes["face_encoder.conv1_local.conv.weight"][1],
        )
        return AnimateSize(
            dim=dim,
            num_heads=dim // shapes["face_adapter.fuser_blocks.0.q_norm.weight"][0],
            num_face_blocks=count_blocks(shapes, "face_adapter.fuser_blocks."),
            latent_channels=latent_channels,
            motion_channels=tuple(channels),
            motion_dim=motion_dim,
            num_motion_directions=shapes["motion_encoder.dec.direction.weight"][1],
            face_width=face_width,
            num_face_heads=shapes["face_encoder.conv1_local.conv.weight"][0] // face_width,
        )
    except KeyError as missing:
        raise ValueError(f"the checkpoint has no tensor {missing}: its Animate adapter is not complete") from None
