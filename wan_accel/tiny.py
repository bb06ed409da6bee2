"""Make a tiny random checkpoint of a variant, in the files and names of the released ones.

Weights are drawn so that a small run shows learning: layers keep the scale of their input, and the VAE's
latents of real pictures are smooth, informative and about as large as a trained VAE's.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_animate_adapter import Generator as MotionEncoder
from diffsynth.models.wan_video_image_encoder import VisionTransformer
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import CausalConv3d, Resample, ResidualBlock, VideoVAE38_, VideoVAE_
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from torch import Generator, Tensor, nn

from wan_accel.models.dit import FACE_BLOCK_EVERY, AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.encoder_sizes import CLIP_HEADS
from wan_accel.models.encoders import LATENT_STATISTICS
from wan_accel.models.variants import (
    CLIP_FILE,
    TEXT_ENCODER_FILE,
    TEXT_LENGTH,
    TOKENIZER_FOLDER,
    DitSize,
    Variant,
    get_variant,
)
from wan_accel.original_files import write_config, write_shards

DIM, NUM_HEADS, NUM_LAYERS, FFN_DIM, FREQ_DIM = 96, 8, 6, 192, 64
TEXT_DIM, CLIP_DIM, VAE_DIM, NUM_TOKENS = 64, 64, 8, 800
MOTION_CHANNELS = (1, 2, 4, 8, 8, 16, 16, 16)
MOTION_DIM, FACE_WIDTH = 32, 32
LATENT_STD = 1.0
NUM_SHARDS = 2
# Order and names of umT5's special tokens; padding must be 0 and the end 1.
_SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def init_tiny(variant: str, out: Path, *, seed: int = 0) -> None:
    """Write a checkpoint of every network of a variant at tiny size, under 30 MB.

    Args:
        variant: a name of the variants table.
        out: a folder that does not exist or is empty.
        seed: of all weights; the same seed gives the same checkpoint.

    Raises:
        ValueError: the variant is not known, or `out` holds something.
    """
    row = get_variant(variant)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give a new one, nothing is overwritten")
    # diffsynth's constructors draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out.mkdir(parents=True, exist_ok=True)
        for expert in row.experts:
            _write_dit(row, out / expert.folder)
        torch.save(_vae(row).state_dict(), out / row.vae.file)
        num_tokens = _write_tokenizer(out / TOKENIZER_FOLDER)
        torch.save(_text_encoder(num_tokens).to(torch.bfloat16).state_dict(), out / TEXT_ENCODER_FILE)
        if row.dit.clip_dim is not None:
            state = {f"visual.{name}": tensor for name, tensor in _clip().state_dict().items()}
            torch.save({"log_scale": torch.tensor(1.0), **state}, out / CLIP_FILE)


def _dit_size(variant: Variant) -> DitSize:
    return dataclasses.replace(
        variant.dit,
        dim=DIM,
        ffn_dim=FFN_DIM,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        freq_dim=FREQ_DIM,
        text_dim=TEXT_DIM,
        clip_dim=CLIP_DIM if variant.dit.clip_dim is not None else None,
    )


def _write_dit(variant: Variant, folder: Path) -> None:
    """Write an expert as two safetensors files, their index and config.json."""
    size = _dit_size(variant)
    dit = build_dit(size)
    _draw(dit)
    with torch.no_grad():
        dit.head.head.weight.mul_(0.1)
        dit.time_projection[1].weight.mul_(0.3)  # gates near 0: blocks start out close to the identity
    tensors = dict(dit.state_dict())
    if variant.has_animate_adapter:
        tensors |= _animate_tensors(size)
    names = sorted(tensors)
    half = -(-len(names) // NUM_SHARDS)
    shards = [names[start : start + half] for start in range(0, len(names), half)]
    write_shards(folder, shards, tensors.__getitem__, {})
    write_config(folder, variant, size)


def _animate_tensors(size: DitSize) -> dict[str, Tensor]:
    adapter = build_animate_adapter(
        AnimateSize(
            dim=size.dim,
            num_heads=size.num_heads,
            num_face_blocks=-(-size.num_layers // FACE_BLOCK_EVERY),
            motion_channels=MOTION_CHANNELS,
            motion_dim=MOTION_DIM,
            face_width=FACE_WIDTH,
        )
    )
    for module in (adapter.pose_patch_embedding, adapter.face_adapter, adapter.face_encoder):
        _draw(module)
    _calibrate_motion(adapter.motion_encoder)
    # The released files do not hold the blur kernels, which are constants.
    return {name: tensor for name, tensor in adapter.state_dict().items() if not name.endswith(".kernel")}


@torch.no_grad()
def _calibrate_motion(encoder: MotionEncoder) -> None:
    """Set the last layer so that the motion coordinates of pictures have mean 0 and std 1.

    The layers before it, whose weights scale themselves, stay as they are drawn.
    """
    coordinates = encoder.enc.enc_motion(_pictures(512, num_frames=1)[:, :, 0])  # (pictures, directions)
    last = encoder.enc.fc[-1]
    std, mean = torch.std_mean(coordinates, dim=0)
    last.weight.div_(std[:, None])
    last.bias.sub_(mean).div_(std)


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    """Draw weights of std 1 / sqrt(fan_in), biases 0; gains of norms stay 1 and modulations small."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(("modulation", "padding_tokens")):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif parameter.ndim > 1 and name.endswith("weight"):
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def _text_encoder(num_tokens: int) -> WanTextEncoder:
    return WanTextEncoder(
        vocab=num_tokens, dim=TEXT_DIM, dim_attn=TEXT_DIM, dim_ffn=2 * TEXT_DIM, num_heads=4, num_layers=2
    )


def _clip() -> VisionTransformer:
    return VisionTransformer(
        image_size=224,
        patch_size=14,
        dim=CLIP_DIM,
        out_dim=32,
        num_heads=CLIP_HEADS,
        num_layers=3,
        activation="gelu",
    )


def _write_tokenizer(folder: Path) -> int:
    """Train a Unigram tokenizer on the shipped captions; returns the number of its tokens."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = list(_SPECIAL_TOKENS.values())
    captions = Path(__file__).with_name("tiny_corpus.txt").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(
        captions,
        UnigramTrainer(vocab_size=NUM_TOKENS, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    end = special.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": TEXT_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | _SPECIAL_TOKENS, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(_SPECIAL_TOKENS, indent=2) + "\n")
    return tokenizer.get_vocab_size()


@torch.no_grad()
def _vae(variant: Variant) -> VideoVAE_:
    """A VAE whose encoder averages while it goes down and adds random features at each size."""
    channels = variant.vae.latent_channels
    if variant.vae.name == "wan2.1":
        model = VideoVAE_(dim=VAE_DIM, z_dim=channels, num_res_blocks=1)
    else:
        model = VideoVAE38_(dim=VAE_DIM, dec_dim=VAE_DIM, z_dim=channels, num_res_blocks=1)
    _draw(model)
    for module in model.encoder.modules():
        if isinstance(module, CausalConv3d):
            _see_one_frame(module)
    for module in model.encoder.modules():
        if isinstance(module, Resample):
            _average(module)
        elif isinstance(module, ResidualBlock):
            module.residual[6].weight.mul_(0.5)
    # The head divides by the length of the features; a constant among them keeps brightness apart from 0.
    model.encoder.conv1.bias.normal_()
    _calibrate(model, variant)
    return model


def _see_one_frame(conv: nn.Conv3d) -> None:
    """Cut a convolution's view of earlier frames, zeros before the first: all frames then look alike."""
    if conv.kernel_size[0] > 1:
        conv.weight[:, :, :-1] = 0
        conv.weight.mul_(conv.kernel_size[0] ** 0.5)


def _average(module: Resample) -> None:
    """Average 2 x 2 pixels within a channel, plus a little of everything else; then average frames."""
    down = module.resample[1].weight
    channel = torch.arange(down.shape[0])
    down.mul_(0.3)
    down[channel, channel, :2, :2] += 0.25  # the third row and column are the next pixels'
    if hasattr(module, "time_conv"):
        module.time_conv.weight.zero_()
        module.time_conv.weight[channel, channel] = 1 / module.time_conv.kernel_size[0]


def _calibrate(model: VideoVAE_, variant: Variant) -> None:
    """Set the last layer so that normalised latents of pictures have mean 0 and std 1, hardly correlated.

    It takes the principal components of the encoder's features, evened out, and mixes them by a rotation.
    """
    channels = variant.vae.latent_channels
    pixels = variant.vae.stride[1]
    num_features = 2 * channels
    model.conv1.weight.copy_(torch.eye(num_features)[:, :, None, None, None])
    halves = []
    # `encode` returns the first half of conv1's output; a swapped identity shows the other half.
    for _ in range(2):
        halves.append(model.encode(_pictures(16 * pixels), [torch.zeros(channels), torch.ones(channels)]))
        model.conv1.weight.copy_(model.conv1.weight.roll(channels, 0))
    features = torch.cat(halves, dim=1).transpose(0, 1).flatten(1)  # (2C, samples)
    mean = features.mean(dim=1)
    variances, components = torch.linalg.eigh(torch.cov(features))
    variances, components = variances[-channels:], components[:, -channels:]
    evened = components / (variances + 0.02 * variances[-1]).sqrt()  # (2C, C)
    rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
    weight = (evened @ rotation).T  # (C, 2C)
    weight *= LATENT_STD / (weight @ (features - mean[:, None])).std(dim=1, keepdim=True)
    latent_mean, latent_std = (torch.tensor(values) for values in LATENT_STATISTICS[variant.vae.name])
    model.conv1.weight[:channels] = (weight * latent_std[:, None])[:, :, None, None, None]
    model.conv1.bias[:channels] = latent_mean - latent_std * (weight @ mean)


def _pictures(size: int, *, num: int = 8, num_frames: int = 5) -> Tensor:
    """Made-up videos (num, 3, num_frames, size, size) in [-1, 1] with the 1/f spectrum of natural ones."""
    generator = Generator().manual_seed(0)
    frames = torch.zeros(num, 3, num_frames, size, size)
    cells = 1
    while cells <= size:
        grey, colour, motion = (
            torch.randn(num, channels, times, cells, cells, generator=generator)
            for channels, times in ((1, 1), (3, 1), (1, num_frames))
        )
        layer = (grey + 0.3 * colour + 0.2 * motion).transpose(1, 2).flatten(0, 1)
        smooth = F.interpolate(layer, size=(size, size), mode="bicubic", align_corners=False)
        frames += 0.5 * smooth.unflatten(0, (num, num_frames)).transpose(1, 2) / cells**0.7
        cells *= 2
    return frames.clamp(-1, 1)
