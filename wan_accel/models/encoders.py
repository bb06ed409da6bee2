"""The frozen encoders of a Wan checkpoint: text (umT5), video (VAE), image (CLIP) and face motion.

Sizes come from tensor shapes, so tiny checkpoints in the original layout load as the released ones do.
Shapes: B batch, T video frames, F latent frames, H x W pixels, h x w latents, L tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_image_encoder import VisionTransformer
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE_
from torch import Tensor, nn

from wan_accel.models.checkpoint_files import TOKENIZER_FILE, read_encoder, tokenizer_folder
from wan_accel.models.dit import Shapes, animate_size_from_shapes, build_animate_adapter
from wan_accel.models.encoder_sizes import build_clip, build_text_encoder, build_vae21, build_vae22
from wan_accel.models.loading import (
    MOTION_ENCODER,
    CheckpointError,
    CheckpointReader,
    compare_tensors,
    dit_folder,
    fill_parameters,
)
from wan_accel.models.variants import (
    CLIP_FILE,
    TEXT_ENCODER_FILE,
    TEXT_LENGTH,
    Variant,
)

Network = TypeVar("Network", bound=nn.Module)
# Statistics of CLIP's training pictures, RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Mean and standard deviation of each latent channel over the VAEs' training videos
# (wan/modules/vae2_1.py and vae2_2.py): a normalised latent is (mu - mean) / std.
LATENT_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "wan2.1": (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
    "wan2.2": (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
         -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
         -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
         -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
         0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}  # fmt: skip


class TextEncoder:
    """umT5 with its tokenizer. Captions are cleaned (mojibake, HTML entities, whitespace) as Wan does."""

    def __init__(self, model: WanTextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_dim: int = model.dim

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[Tensor]:
        """Encode captions at once to (L <= 512, text_dim) each, end token included, padding cut off."""
        ids, mask = self.tokenizer(texts, return_mask=True, add_special_tokens=True)
        device = self.model.token_embedding.weight.device
        states = self.model(ids.to(device), mask.to(device))
        return [state[:length].clone() for state, length in zip(states, mask.sum(dim=1).tolist())]

    def is_cut(self, text: str) -> bool:
        """Tell whether a caption has more than 512 tokens, of which `encode` drops the rest."""
        return len(self.tokenizer.tokenizer(self.tokenizer._clean(text))["input_ids"]) > TEXT_LENGTH


class VideoVae:
    """A video VAE."""

    def __init__(self, model: VideoVAE_, variant: Variant) -> None:
        self.model = model
        self.stride = variant.vae.stride
        mean, std = LATENT_STATISTICS[variant.vae.name]
        self._scale = [torch.tensor(mean), 1.0 / torch.tensor(std)]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to normalised latents: the mean of the posterior, no sampling.

        Args:
            frames: (B, 3, T, H, W) in [-1, 1], T = 4n + 1.

        Returns:
            (B, latent_channels, n + 1, h, w) in the VAE's dtype.

        Raises:
            ValueError: T, H or W does not fit the strides.
        """
        num_frames, height, width = frames.shape[2:]
        stride_t, stride_h, stride_w = self.stride
        if num_frames % stride_t != 1 or height % stride_h or width % stride_w:
            raise ValueError(
                f"the VAE got {num_frames} frames of {height}x{width}: give {stride_t}n+1 frames, "
                f"height and width multiples of {stride_h} and {stride_w}"
            )
        weight = self.model.conv1.weight
        latents = self.model.encode(frames.to(weight.device, weight.dtype), self._scale)
        self.model.clear_cache()  # holds the activations of the last frames otherwise
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents, four frames at a time.

        Args:
            latents: (B, latent_channels, F, h, w).

        Returns:
            (B, 3, 4 (F - 1) + 1, H, W) in [-1, 1], in the VAE's dtype.
        """
        weight = self.model.conv1.weight
        frames = self.model.decode(latents.to(weight.device, weight.dtype), self._scale)
        self.model.clear_cache()
        return frames.clamp_(-1, 1)


class ImageEncoder:
    """CLIP's vision tower up to its penultimate block."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.clip_dim: int = model.dim

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to (B, 257, clip_dim) in the encoder's dtype."""
        weight = self.model.patch_embedding.weight
        size = (self.model.image_size, self.model.image_size)
        pixels = F.interpolate(image.to(weight.device, torch.float32), size=size, mode="bicubic", align_corners=False)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pixels = (pixels * 0.5 + 0.5 - mean) / std
        return self.model(pixels.to(weight.dtype), use_31_block=True)


def load_text_encoder(
    checkpoint: Path, *, torch_dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Load umT5 and its tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors are not those of umT5.
    """
    tokenizer = load_tokenizer(checkpoint)
    return TextEncoder(_load(checkpoint / TEXT_ENCODER_FILE, build_text_encoder, torch_dtype, device), tokenizer)


def load_tokenizer(checkpoint: Path) -> HuggingfaceTokenizer:
    """umT5's tokenizer.

    Raises:
        CheckpointError: it is missing.
    """
    folder = tokenizer_folder(checkpoint)
    if not (folder / Path(TOKENIZER_FILE).name).is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: download {folder.relative_to(checkpoint)}/ of it again")
    return HuggingfaceTokenizer(str(folder), seq_len=TEXT_LENGTH, clean="whitespace")


def load_vae(
    checkpoint: Path,
    variant: Variant,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoVae:
    """Load a variant's video VAE. Wan itself runs it in fp32.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of the VAE.
    """
    build = {"wan2.1": build_vae21, "wan2.2": build_vae22}[variant.vae.name]
    return VideoVae(_load(checkpoint / variant.vae.file, build, torch_dtype, device), variant)


def load_clip(
    checkpoint: Path, *, torch_dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ImageEncoder:
    """Load CLIP's vision tower; the file's text tower is left alone.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of a ViT.
    """
    return ImageEncoder(_load(checkpoint / CLIP_FILE, build_clip, torch_dtype, device, prefix="visual."))


def load_motion_encoder(
    checkpoint: Path,
    variant: Variant,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load Animate's motion encoder alone, from the DiT's files, for `encode_motion` of the denoiser.

    Raises:
        CheckpointError: the checkpoint has no complete motion encoder.
    """
    reader = CheckpointReader(dit_folder(checkpoint, variant, variant.experts[0].name))
    holder = nn.Module()
    try:
        with torch.device("meta"):
            adapter = build_animate_adapter(animate_size_from_shapes(reader.shapes))
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from None
    encoder = adapter.motion_encoder.to(torch_dtype)
    holder.motion_encoder = encoder  # under the name that it has in the files
    wanted = {name: tuple(p.shape) for name, p in holder.named_parameters()}
    # Blur kernels are constants that the original does not store; `fill_parameters` computes them.
    wanted = {n: s for n, s in wanted.items() if n in reader.shapes or not n.endswith(".kernel")}
    found = {name: shape for name, shape in reader.shapes.items() if name.startswith(MOTION_ENCODER)}
    compare_tensors(wanted, found, reader.folder)
    holder.to_empty(device=device)
    fill_parameters(holder, reader, seed=0)
    return encoder.eval().requires_grad_(False)


def _load(
    path: Path,
    build: Callable[[Shapes], nn.Module],
    torch_dtype: torch.dtype,
    device: torch.device | str,
    *,
    prefix: str = "",
) -> nn.Module:
    """Build what the shapes of a file describe, and fill it. Names without `prefix` are left alone."""
    state = {name[len(prefix) :]: t for name, t in read_encoder(path).items() if name.startswith(prefix)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    model = build_skeleton(path, build, shapes, prefix=prefix)
    wanted = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_tensors(wanted, {prefix + name: shape for name, shape in shapes.items()}, path)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=torch_dtype).eval().requires_grad_(False)


def build_skeleton(path: Path, build: Callable[[Shapes], Network], shapes: Shapes, *, prefix: str = "") -> Network:
    """Build what the shapes of a file describe, on the meta device; `prefix` is what their names lack.

    Raises:
        CheckpointError: a tensor that fixes a size is missing.
    """
    try:
        with torch.device("meta"):
            return build(shapes)
    except KeyError as missing:
        raise CheckpointError(
            f"{path} has no tensor {prefix}{missing.args[0]}: it is not the file of that name in a Wan checkpoint"
        ) from None
