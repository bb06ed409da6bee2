"""The encoders against diffsynth's own pipeline units, on the same tiny weights; what damaged files say."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffsynth.models.wan_video_image_encoder import WanImageEncoder, clip_xlm_roberta_vit_h_14
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38
from diffsynth.pipelines.wan_video import WanVideoUnit_InputVideoEmbedder, WanVideoUnit_PromptEmbedder

from wan_accel.models.checkpoint_files import file_identity
from wan_accel.models.conditioning.text import NULL_PROMPTS, caption_id, encode_captions
from wan_accel.models.denoiser import encode_motion
from wan_accel.models.encoder_sizes import build_clip, build_text_encoder, build_vae21, build_vae22
from wan_accel.models.encoders import (
    LATENT_STATISTICS,
    load_clip,
    load_motion_encoder,
    load_text_encoder,
    load_vae,
)
from wan_accel.models.loading import CheckpointError, load_wan
from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE, TOKENIZER_FOLDER, get_variant
from wan_accel.tiny import init_tiny

ANIMATE = get_variant("animate-14b")
CAPTIONS = ["A woman  walks &amp; waves.\n", "视频中的人在做动作", "", "cafÃ© at night"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "animate"
    init_tiny("animate-14b", folder)
    return folder


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(params=["missing", "short", "other"])
def broken(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """A checkpoint whose VAE file is spoilt in one way, the file's name and what the error must say."""
    name = ANIMATE.vae.file
    data = (checkpoint / name).read_bytes()
    if request.param == "short":
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        return tmp_path, name, "is damaged or cut short .* download it again"
    if request.param == "other":
        (tmp_path / name).write_bytes((checkpoint / CLIP_FILE).read_bytes())
        return tmp_path, name, "has no tensor encoder.conv1.weight: it is not the file of that name"
    return tmp_path, name, "does not exist: download"


@pytest.mark.parametrize(
    ("build", "full_size"),
    [
        (build_text_encoder, WanTextEncoder),
        (build_vae21, VideoVAE_),
        (build_vae22, VideoVAE38_),
        (build_clip, lambda: clip_xlm_roberta_vit_h_14().visual),
    ],
)
def test_sizes_of_the_released_encoders(build: Callable, full_size: Callable) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in full_size().state_dict().items()}
        assert {name: tensor.shape for name, tensor in build(expected).state_dict().items()} == expected


def test_text_equals_prompt_embedder_of_diffsynth(checkpoint: Path) -> None:
    encoder = load_text_encoder(checkpoint, torch_dtype=torch.float32)
    tokenizer = HuggingfaceTokenizer(name=str(checkpoint / TOKENIZER_FOLDER), seq_len=512, clean="whitespace")
    pipe = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder.model, device="cpu")
    unit = WanVideoUnit_PromptEmbedder()
    for caption, ours in zip(CAPTIONS, encoder.encode(CAPTIONS)):
        with torch.no_grad():
            # One caption at a time: given several, diffsynth cuts all to the shortest.
            theirs = unit.encode_prompt(pipe, [caption])[0]  # (512, text_dim), zeros behind
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-5, atol=1e-5)
        assert not theirs[len(ours) :].any()


def test_text_is_cleaned_and_ends_with_end_token(checkpoint: Path) -> None:
    encoder = load_text_encoder(checkpoint, torch_dtype=torch.float32)
    dirty, clean, empty = encoder.encode([CAPTIONS[0], "A woman walks & waves.", ""])
    assert torch.equal(dirty, clean)
    assert empty.shape == (1, 64)
    assert not torch.allclose(dirty[0], dirty[1])


def test_encode_captions_encodes_each_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text_encoder(checkpoint)
    rows = list(encode_captions(encoder, ["a", "b", "a", "walk " * 600], batch_size=2))
    assert [row.caption for row in rows] == ["a", "b", "walk " * 600]
    assert rows[0].caption_id == caption_id("a") != rows[1].caption_id
    assert rows[2].embeddings.shape == (512, 64) and rows[2].embeddings.dtype == torch.bfloat16
    assert caplog.text.count("more than 512 tokens") == 1
    empty, negative = encode_captions(encoder, NULL_PROMPTS.values())
    assert len(empty.embeddings) == 1 < len(negative.embeddings)


def test_vae_equals_diffsynth(checkpoint: Path) -> None:
    vae = load_vae(checkpoint, ANIMATE)
    theirs = WanVideoVAE.__new__(WanVideoVAE)  # its __init__ builds the full size
    torch.nn.Module.__init__(theirs)
    mean, std = (torch.tensor(values) for values in LATENT_STATISTICS["wan2.1"])
    theirs.model, theirs.scale, theirs.z_dim, theirs.upsampling_factor = vae.model, [mean, 1.0 / std], 16, 8
    video = pictures(2, 3, 9, 32, 48)
    ours = vae.encode(video)
    assert ours.shape == (2, 16, 3, 4, 6) and vae.stride == (4, 8, 8)
    # diffsynth runs one video at a time: convolutions of another batch size round differently.
    torch.testing.assert_close(ours, theirs.encode(list(video), device="cpu"), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, vae.encode(video))


@pytest.mark.parametrize(("name", "module"), [("animate-14b", WanVideoVAE), ("ti2v-5b", WanVideoVAE38)])
def test_vae_decodes_as_diffsynth(name: str, module: type, checkpoint: Path, tmp_path: Path) -> None:
    variant = get_variant(name)
    if name != "animate-14b":
        init_tiny(name, tmp_path)
        checkpoint = tmp_path
    vae = load_vae(checkpoint, variant)
    theirs = module.__new__(module)  # its __init__ builds the full size
    torch.nn.Module.__init__(theirs)
    mean, std = (torch.tensor(values) for values in LATENT_STATISTICS[variant.vae.name])
    theirs.model, theirs.scale = vae.model, [mean, 1.0 / std]
    latents = torch.randn(2, variant.vae.latent_channels, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    ours = vae.decode(latents)
    _, stride_h, stride_w = vae.stride
    assert ours.shape == (2, 3, 9, 2 * stride_h, 3 * stride_w) and ours.dtype == torch.float32
    assert -1 <= ours.min() < ours.max() <= 1 and ours.std() > 0.1
    # diffsynth runs one video at a time: convolutions of another batch size round differently.
    torch.testing.assert_close(ours, theirs.decode(list(latents), device="cpu"), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, vae.decode(latents))


def test_vae22_equals_diffsynth(tmp_path: Path) -> None:
    ti2v = get_variant("ti2v-5b")
    init_tiny("ti2v-5b", tmp_path / "ti2v")
    vae = load_vae(tmp_path / "ti2v", ti2v)
    theirs = WanVideoVAE38.__new__(WanVideoVAE38)
    torch.nn.Module.__init__(theirs)
    mean, std = (torch.tensor(values) for values in LATENT_STATISTICS["wan2.2"])
    theirs.model, theirs.scale, theirs.z_dim, theirs.upsampling_factor = vae.model, [mean, 1.0 / std], 48, 16
    video = pictures(2, 3, 9, 64, 96)
    pipe = SimpleNamespace(
        load_models_to_device=lambda names: None, preprocess_video=lambda frames: frames, vae=theirs, device="cpu",
        torch_dtype=torch.float32, scheduler=SimpleNamespace(training=True),
    )  # fmt: skip
    with torch.no_grad():
        expected = WanVideoUnit_InputVideoEmbedder().process(
            pipe, video, noise=None, tiled=False, tile_size=None, tile_stride=None, vace_reference_image=None,
            framewise_decoding=False, animate2_reference_image=None, animate2_reference_video=None,
        )["input_latents"]  # fmt: skip
    ours = vae.encode(video)
    assert ours.shape == (2, 48, 3, 4, 6) and vae.stride == (4, 16, 16)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "module"), [("wan2.1", WanVideoVAE), ("wan2.2", WanVideoVAE38)])
def test_latent_statistics_are_diffsynths(name: str, module: type, monkeypatch: pytest.MonkeyPatch) -> None:
    network = "VideoVAE_" if name == "wan2.1" else "VideoVAE38_"
    monkeypatch.setattr(f"diffsynth.models.wan_video_vae.{network}", lambda **_: torch.nn.Identity())
    theirs = module()
    assert theirs.mean.tolist() == pytest.approx(LATENT_STATISTICS[name][0])
    assert theirs.std.tolist() == pytest.approx(LATENT_STATISTICS[name][1])


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 5, 30, 32)])
def test_vae_refuses_sizes_off_its_strides(checkpoint: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give 4n\+1 frames, height and width multiples of 8 and 8"):
        load_vae(checkpoint, ANIMATE).encode(torch.zeros(shape))


def test_clip_equals_diffsynth(checkpoint: Path) -> None:
    clip = load_clip(checkpoint)
    theirs = WanImageEncoder.__new__(WanImageEncoder)
    torch.nn.Module.__init__(theirs)
    theirs.model = SimpleNamespace(image_size=224, visual=clip.model)
    mean, std = (torch.tensor(v)[:, None, None] for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    theirs.transforms = SimpleNamespace(transforms=[lambda pixels: (pixels - mean) / std])
    image = pictures(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.encode_image([image])
    assert expected.shape == (2, 257, 64)
    torch.testing.assert_close(clip.encode(image), expected, rtol=1e-5, atol=1e-5)


def test_motion_encoder_equals_the_denoisers(checkpoint: Path) -> None:
    alone = load_motion_encoder(checkpoint, ANIMATE)
    whole = load_wan("animate-14b", checkpoint, with_motion_encoder=True)
    faces = pictures(1, 3, 2, 512, 512)
    with torch.no_grad():
        vectors = encode_motion(alone, faces)
        assert vectors.shape == (1, 2, 32)
        assert torch.equal(vectors, encode_motion(whole.motion_encoder, faces))
    assert not any(parameter.requires_grad for parameter in alone.parameters())


def test_motion_encoder_of_another_variant(checkpoint: Path, tmp_path: Path) -> None:
    init_tiny("t2v-1.3b", tmp_path / "t2v")
    with pytest.raises(CheckpointError, match="Animate adapter is not complete"):
        load_motion_encoder(tmp_path / "t2v", ANIMATE)


def test_spoilt_file_is_named(broken: tuple[Path, str, str]) -> None:
    folder, name, message = broken
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load_vae(folder, ANIMATE)


def test_all_tensor_problems_in_one_error(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint / CLIP_FILE, weights_only=True)
    state["visual.extra"] = torch.zeros(2)
    state["visual.pre_norm.weight"] = torch.zeros(3)
    del state["visual.post_norm.bias"]
    torch.save(state, tmp_path / CLIP_FILE)
    with pytest.raises(CheckpointError, match=r"\(3 tensors\)") as error:
        load_clip(tmp_path)
    message = str(error.value)
    assert "missing visual.post_norm.bias (64,)" in message and "unknown visual.extra (2,)" in message
    assert "visual.pre_norm.weight has shape (3,), expected (64,)" in message


def test_missing_tokenizer_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / TEXT_ENCODER_FILE).write_bytes((checkpoint / TEXT_ENCODER_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"umt5-xxl has no tokenizer\.json: download"):
        load_text_encoder(tmp_path)


def test_file_identity_sees_content_and_size(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_bytes(bytes(300_000))
    second.write_bytes(bytes(300_000))
    third.write_bytes(bytes(300_001))
    assert file_identity(first) == file_identity(second) != file_identity(third)
    second.write_bytes(bytes(299_999) + b"x")
    assert file_identity(first) != file_identity(second)
