"""What DiffSynth's online step spends on conditions: encoders of the real size with random bf16 weights, one sample."""

import gc
import statistics
from collections.abc import Callable

import torch
from diffsynth.models.wan_video_image_encoder import VisionTransformer
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from step_slices import TINY_MOTION, Slice
from step_timing import seconds_of
from torch import Tensor, nn

from wan_accel.models.denoiser import encode_motion
from wan_accel.models.dit import AnimateSize, build_animate_adapter
from wan_accel.models.encoder_sizes import CLIP_HEADS
from wan_accel.models.encoders import ImageEncoder, VideoVae
from wan_accel.models.variants import FACE_SIZE, TEXT_LENGTH

REPEATS = 3
TINY_VIDEO = (5, 32, 32)
Encode = Callable[[], object]


def encoder_seconds(slice_: Slice, device: torch.device, tiny: bool) -> dict[str, float] | str:
    """Median seconds of each encoder that a sample of the slice's variant passes; why not, if one does not run here."""
    seconds = {}
    for name, start in _encoders(slice_).items():
        try:
            with torch.no_grad():
                encode = start(slice_, device, tiny)
                encode()
                seconds[name] = statistics.median(seconds_of(encode, device) for _ in range(1 if tiny else REPEATS))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            return f"{name}: {str(error).splitlines()[0]}"
        encode = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return seconds


def _encoders(slice_: Slice) -> dict[str, Callable[[Slice, torch.device, bool], Encode]]:
    """Encoders by name: what the variant is conditioned on decides."""
    found: dict[str, Callable[[Slice, torch.device, bool], Encode]] = {"text": _text, "video": _video}
    kinds = {"pose": _video, "clip": _clip, "face": _motion, "fused_first_frame": _first_frame}
    return found | {kind: kinds[kind] for kind in slice_.row.conditioning if kind in kinds}


def _text(slice_: Slice, device: torch.device, tiny: bool) -> Encode:
    """umT5 on 512 tokens: DiffSynth pads every caption."""
    options = {"vocab": 64, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 2} if tiny else {}
    model = _random(lambda: WanTextEncoder(**options), device)
    ids = torch.randint(0, 64, (1, TEXT_LENGTH), device=device)
    return lambda: model(ids, torch.ones_like(ids))


def _video(slice_: Slice, device: torch.device, tiny: bool) -> Encode:
    return _vae(slice_, device, tiny, TINY_VIDEO if tiny else slice_.video)


def _first_frame(slice_: Slice, device: torch.device, tiny: bool) -> Encode:
    _, height, width = TINY_VIDEO if tiny else slice_.video
    return _vae(slice_, device, tiny, (1, height, width))


def _vae(slice_: Slice, device: torch.device, tiny: bool, video: tuple[int, int, int]) -> Encode:
    channels, is_first = slice_.row.vae.latent_channels, slice_.row.vae.name == "wan2.1"
    sizes = {"dim": 8, "num_res_blocks": 1} if tiny else {}
    if is_first:
        model = _random(lambda: VideoVAE_(z_dim=channels, **sizes), device)
    else:
        more = {"dec_dim": 8} if tiny else {}
        model = _random(lambda: VideoVAE38_(z_dim=channels, **sizes, **more), device)
    vae = VideoVae(model, slice_.row)  # type: ignore[arg-type]
    frames = torch.rand(1, 3, *video, device=device, dtype=torch.bfloat16) * 2 - 1
    return lambda: vae.encode(frames)


def _clip(slice_: Slice, device: torch.device, tiny: bool) -> Encode:
    """ViT-H/14."""
    dim, layers = (80, 3) if tiny else (1280, 32)
    model = _random(
        lambda: VisionTransformer(
            image_size=224, patch_size=14, dim=dim, out_dim=1024, num_heads=CLIP_HEADS, num_layers=layers,
            activation="gelu",
        ),
        device,
    )  # fmt: skip
    clip = ImageEncoder(model)  # type: ignore[arg-type]
    image = torch.rand(1, 3, 224, 224, device=device)
    return lambda: clip.encode(image)


def _motion(slice_: Slice, device: torch.device, tiny: bool) -> Encode:
    """Animate's motion encoder on a face a frame."""
    size = AnimateSize(dim=64, num_heads=4, num_face_blocks=0, **(TINY_MOTION if tiny else {}))
    model = _random(lambda: build_animate_adapter(size).motion_encoder, device)
    num_frames = (TINY_VIDEO if tiny else slice_.video)[0]
    faces: Tensor = torch.rand(1, 3, num_frames, FACE_SIZE, FACE_SIZE, device=device, dtype=torch.bfloat16) * 2 - 1
    return lambda: encode_motion(model, faces)


def _random(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model with random bf16 weights, made on the device: umT5 alone would be 23 GB in fp32 on the host."""
    with torch.device("meta"):
        model = build().to(torch.bfloat16)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)
