"""The table of Wan variants: sizes, experts, inputs and checkpoint files. Torch-free."""

import difflib
from dataclasses import dataclass
from typing import Literal

# Inputs that a denoiser can take beside the noisy latents, the timestep and the text embeddings. The first frame is
# joined to the channels of the noisy latents (`first_frame`), or stands in them as it is (`fused_first_frame`).
Conditioning = Literal["reference", "pose", "face", "known", "clip", "first_frame", "fused_first_frame"]
_MODEL_TYPES: dict[Conditioning, str] = {"pose": "animate", "first_frame": "i2v", "fused_first_frame": "ti2v"}


# As `model.expert`: both experts of a pair in one run.
BOTH = "both"


@dataclass(frozen=True, kw_only=True, slots=True)
class DitSize:
    """Sizes of one Wan DiT. Tiny checkpoints derive theirs from tensor shapes instead.

    `in_dim` counts noise channels plus concatenated condition channels; `out_dim` is the velocity.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    in_dim: int
    out_dim: int
    freq_dim: int = 256
    text_dim: int = 4096
    clip_dim: int | None = None
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One DiT of a variant and the half-open range [sigma_min, sigma_max) of noise levels it is trained on.

    `sigma_max` of 1.0 includes 1.0. `folder` is relative to the checkpoint, "" for its root.
    """

    name: Literal["default", "high", "low"]
    folder: str = ""
    sigma_min: float = 0.0
    sigma_max: float = 1.0

    def covers(self, sigma: float) -> bool:
        """Tell whether the expert is the one for a noise level."""
        return self.sigma_min <= sigma < self.sigma_max or sigma == self.sigma_max == 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSize:
    """A video VAE: latent channels and strides (frames, height, width) of latents against pixels."""

    name: Literal["wan2.1", "wan2.2"]
    file: str
    latent_channels: int
    stride: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the table. `reference_frames` latent frames are put in front of the video's own."""

    name: str
    hub_id: str
    dit: DitSize
    vae: VaeSize
    experts: tuple[Expert, ...] = (Expert(name="default"),)
    conditioning: tuple[Conditioning, ...] = ()
    reference_frames: int = 0
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    shift: float = 5.0
    num_frames: int = 81
    fps: float = 16.0

    @property
    def has_animate_adapter(self) -> bool:
        return "pose" in self.conditioning

    @property
    def model_type(self) -> str:
        """What the original's config.json calls such a model."""
        return next((_MODEL_TYPES[kind] for kind in self.conditioning if kind in _MODEL_TYPES), "t2v")

    @property
    def takes_first_frame(self) -> bool:
        """The first frame of a video is given, so that only the others are left to predict."""
        return "first_frame" in self.conditioning or self.fuses_first_frame

    @property
    def fuses_first_frame(self) -> bool:
        return "fused_first_frame" in self.conditioning

    @property
    def size_divisor(self) -> int:
        """Height and width of a video must be multiples of this many pixels (VAE stride x patch)."""
        return self.vae.stride[1] * self.dit.patch_size[1]

    def expert(self, name: str) -> Expert:
        """Look an expert up by name.

        Raises:
            ValueError: the variant has no such expert.
        """
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise ValueError(
            f"model.expert={name!r} does not exist in {self.name}: use {' or '.join(e.name for e in self.experts)}"
        )

    def trained_experts(self, name: str | None) -> tuple[Expert, ...]:
        """The experts that `model.expert` names: one of them, or all of a pair for `both`.

        Args:
            name: `high`, `low`, `both`, `default`, or None for a variant with one expert.

        Raises:
            ValueError: the variant has no such expert, or has two and none is named.
        """
        if name == BOTH and len(self.experts) > 1:
            return self.experts
        if name is None and len(self.experts) > 1:
            raise ValueError(
                f"model.expert is missing: {self.name} has {' and '.join(e.name for e in self.experts)}; name one, or "
                f"{BOTH} to train the pair in one run"
            )
        return (self.expert(name or self.experts[0].name),)

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a clip of `num_frames` (4n+1) frames of height x width pixels, reference slot included."""
        stride_t, stride_h, stride_w = self.vae.stride
        patch_t, patch_h, patch_w = self.dit.patch_size
        latent_frames = (num_frames - 1) // stride_t + 1 + self.reference_frames
        return (latent_frames // patch_t) * (height // stride_h // patch_h) * (width // stride_w // patch_w)


TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_LENGTH = 512
FACE_SIZE = 512

_VAE21 = VaeSize(name="wan2.1", file="Wan2.1_VAE.pth", latent_channels=16, stride=(4, 8, 8))
_VAE22 = VaeSize(name="wan2.2", file="Wan2.2_VAE.pth", latent_channels=48, stride=(4, 16, 16))


def _a14b(in_dim: int, clip_dim: int | None = None) -> DitSize:
    return DitSize(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40, in_dim=in_dim, out_dim=16, clip_dim=clip_dim)


def _experts(boundary: float) -> tuple[Expert, ...]:
    """The two experts of an A14B pair; `boundary` in sigma, the high-noise one at or above it."""
    return (
        Expert(name="high", folder="high_noise_model", sigma_min=boundary),
        Expert(name="low", folder="low_noise_model", sigma_max=boundary),
    )


# Shift, frames and rate are those that the original samples with (Wan2.2: wan/configs; Wan2.1: generate.py,
# `_validate_args`, whose shift is 5 but for image-to-video in 480p).
_ROWS = (
    Variant(
        name="animate-14b",
        hub_id="Wan-AI/Wan2.2-Animate-14B",
        dit=_a14b(in_dim=36, clip_dim=1280),
        vae=_VAE21,
        conditioning=("reference", "pose", "face", "known", "clip"),
        reference_frames=1,
        num_frames=77,
        fps=30.0,
    ),
    Variant(
        name="t2v-a14b",
        hub_id="Wan-AI/Wan2.2-T2V-A14B",
        dit=_a14b(in_dim=16),
        vae=_VAE21,
        experts=_experts(0.875),
        shift=12.0,
    ),
    Variant(
        name="i2v-a14b",
        hub_id="Wan-AI/Wan2.2-I2V-A14B",
        dit=_a14b(in_dim=36),
        vae=_VAE21,
        experts=_experts(0.900),
        conditioning=("first_frame",),
    ),
    Variant(
        name="ti2v-5b",
        hub_id="Wan-AI/Wan2.2-TI2V-5B",
        dit=DitSize(dim=3072, ffn_dim=14336, num_layers=30, num_heads=24, in_dim=48, out_dim=48),
        vae=_VAE22,
        conditioning=("fused_first_frame",),
        num_frames=121,
        fps=24.0,
    ),
    Variant(
        name="t2v-1.3b",
        hub_id="Wan-AI/Wan2.1-T2V-1.3B",
        dit=DitSize(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12, in_dim=16, out_dim=16),
        vae=_VAE21,
    ),
    Variant(name="t2v-14b", hub_id="Wan-AI/Wan2.1-T2V-14B", dit=_a14b(in_dim=16), vae=_VAE21),
    Variant(
        name="i2v-14b-480p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-480P",
        dit=_a14b(in_dim=36, clip_dim=1280),
        vae=_VAE21,
        conditioning=("first_frame", "clip"),
        shift=3.0,
    ),
    Variant(
        name="i2v-14b-720p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-720P",
        dit=_a14b(in_dim=36, clip_dim=1280),
        vae=_VAE21,
        conditioning=("first_frame", "clip"),
    ),
)
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def get_variant(name: str) -> Variant:
    """Look a variant up by name.

    Raises:
        ValueError: no such row; the message names the nearest one and lists all.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"variant {name!r} is not known{hint}: use {', '.join(VARIANTS)}")
