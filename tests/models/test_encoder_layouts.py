"""The encoders of a diffusers repository give the outputs of diffusers' and transformers' own classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffsynth.models.wan_video_image_encoder import clip_xlm_roberta_vit_h_14
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from diffusers import AutoencoderKLWan
from diffusers_wan import randomise, save_repository
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from wan_accel.models import encoder_layouts
from wan_accel.models.checkpoint_files import check_encoder_files, condition_keys, encoder_files
from wan_accel.models.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    LATENT_STATISTICS,
    load_clip,
    load_motion_encoder,
    load_text_encoder,
    load_vae,
)
from wan_accel.models.errors import CheckpointError
from wan_accel.models.variants import get_variant
from wan_accel.tiny import _write_tokenizer

ANIMATE, TI2V = get_variant("animate-14b"), get_variant("ti2v-5b")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def tiny_vae(version: str) -> AutoencoderKLWan:
    if version == "wan2.1":
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    else:
        vae = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12,
            out_channels=12, patch_size=2, scale_factor_spatial=16, temperal_downsample=[False, True, True],
        )  # fmt: skip
    randomise(vae, 0)
    return vae.eval()


def tiny_text(num_tokens: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=num_tokens, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = UMT5EncoderModel(config)
    randomise(model, 1)
    return model.eval()


def tiny_clip(*, with_projection: bool = False) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=16, patch_size=14,
        image_size=224, hidden_act="gelu", projection_dim=32,
    )  # fmt: skip
    model = (CLIPVisionModelWithProjection if with_projection else CLIPVisionModel)(config)
    randomise(model, 2)
    return model.eval()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    save_repository(folder, "animate-14b")
    tiny_vae("wan2.1").save_pretrained(folder / "vae")
    num_tokens = _write_tokenizer(folder / "tokenizer")
    tiny_text(num_tokens).save_pretrained(folder / "text_encoder")
    tiny_clip().save_pretrained(folder / "image_encoder")
    return folder


@pytest.mark.parametrize(("variant", "size"), [(ANIMATE, 32), (TI2V, 64)])
@torch.no_grad()
def test_vae(tmp_path: Path, variant: object, size: int) -> None:
    version = variant.vae.name
    theirs = tiny_vae(version)
    theirs.save_pretrained(tmp_path / "vae")
    (tmp_path / "transformer").mkdir()
    video = torch.rand(1, 3, 9, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in LATENT_STATISTICS[version])
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    ours = load_vae(tmp_path, variant)
    torch.testing.assert_close(ours.encode(video), expected, **TOLERANCE)
    latents = torch.randn(1, variant.vae.latent_channels, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    decoded = ours.model.decode(latents, [torch.zeros(latents.shape[1]), torch.ones(latents.shape[1])])
    torch.testing.assert_close(decoded.clamp(-1, 1), theirs.decode(latents).sample.clamp(-1, 1), **TOLERANCE)


@torch.no_grad()
def test_text(repository: Path) -> None:
    encoder = load_text_encoder(repository, torch_dtype=torch.float32)
    ids = torch.tensor([[5, 9, 300, 17, 1]])
    theirs = UMT5EncoderModel.from_pretrained(repository / "text_encoder").eval()
    torch.testing.assert_close(encoder.model(ids, torch.ones_like(ids)), theirs(ids).last_hidden_state, **TOLERANCE)
    assert encoder.encode(["a woman walks"])[0].shape[1] == 48


@pytest.mark.parametrize("with_projection", [False, True])
@torch.no_grad()
def test_clip(tmp_path: Path, with_projection: bool) -> None:
    theirs = tiny_clip(with_projection=with_projection)
    theirs.save_pretrained(tmp_path / "image_encoder")
    (tmp_path / "transformer").mkdir()
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = theirs((image * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(load_clip(tmp_path).encode(image), expected, **TOLERANCE)


def released_vae22() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, temperal_downsample=[False, True, True],
    )  # fmt: skip


def released_text() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                   feed_forward_proj="gated-gelu")
    )  # fmt: skip


def released_clip() -> CLIPVisionModel:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                         patch_size=14, image_size=224, projection_dim=1024)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "rename", "ours", "prefix"),
    [
        (AutoencoderKLWan, encoder_layouts._vae, VideoVAE_, ""),
        (released_vae22, encoder_layouts._vae, VideoVAE38_, ""),
        (released_text, encoder_layouts._text_encoder, WanTextEncoder, ""),
        (released_clip, encoder_layouts._clip, lambda: clip_xlm_roberta_vit_h_14().visual, "visual."),
    ],
)
def test_released_sizes_are_all_mapped(theirs: Callable, rename: Callable, ours: Callable, prefix: str) -> None:
    with torch.device("meta"):
        found = rename(dict(theirs().state_dict()))
        expected = {prefix + name: tensor.shape for name, tensor in ours().state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == expected


def test_files_are_those_of_the_repository(repository: Path) -> None:
    check_encoder_files(repository, ANIMATE)
    assert encoder_files(ANIMATE, repository)["text"] == ("text_encoder/model.safetensors", "tokenizer/tokenizer.json")
    keys = condition_keys(ANIMATE, repository, known_variants=2)
    assert keys.keys() == {"text", "video", "pose", "known", "reference", "face"}
    load_motion_encoder(repository, ANIMATE)


def test_missing_files_are_named(tmp_path: Path) -> None:
    save_repository(tmp_path, "animate-14b")
    with pytest.raises(CheckpointError) as caught:
        check_encoder_files(tmp_path, ANIMATE)
    for part in (
        "text_encoder/*.safetensors (encodes captions)",
        "vae/*.safetensors (encodes videos)",
        "image_encoder/*.safetensors (encodes reference pictures)",
        "tokenizer/tokenizer.json (splits",
    ):
        assert part in str(caught.value)


def test_an_unknown_tensor_is_listed(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    file = "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(repository / file) | {"decoder.extra.weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"unknown decoder\.extra\.weight \(2,\)"):
        load_vae(tmp_path, ANIMATE)
