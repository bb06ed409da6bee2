"""Tiny checkpoints: files, names and sizes of the released ones, and weights fit to learn with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from wan_accel.models.denoiser import encode_motion
from wan_accel.models.encoders import load_clip, load_motion_encoder, load_text_encoder, load_vae
from wan_accel.models.loading import load_wan
from wan_accel.models.variants import VARIANTS
from wan_accel.tiny import _pictures, init_tiny

SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
DIT_FILES = ["config.json", *SHARDS, "diffusion_pytorch_model.safetensors.index.json"]
TEXT_FILES = ["google/umt5-xxl/special_tokens_map.json", "google/umt5-xxl/tokenizer.json",
              "google/umt5-xxl/tokenizer_config.json", "models_t5_umt5-xxl-enc-bf16.pth"]  # fmt: skip
FILES = {
    "animate-14b": [
        *DIT_FILES, *TEXT_FILES, "Wan2.1_VAE.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    ],
    "t2v-a14b": [
        *(f"{expert}_noise_model/{file}" for expert in ("high", "low") for file in DIT_FILES),
        *TEXT_FILES, "Wan2.1_VAE.pth",
    ],
    "i2v-14b-480p": [
        *DIT_FILES, *TEXT_FILES, "Wan2.1_VAE.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    ],
    "ti2v-5b": [*DIT_FILES, *TEXT_FILES, "Wan2.2_VAE.pth"],
}  # fmt: skip


@pytest.fixture(scope="module", params=FILES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    init_tiny(request.param, folder)
    return request.param, folder


def test_files_are_those_of_the_release(tiny: tuple[str, Path]) -> None:
    name, folder = tiny
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sorted(str(file.relative_to(folder)) for file in files) == sorted(FILES[name])
    assert sum(file.stat().st_size for file in files) < 30e6


def test_index_and_config_describe_the_files(tiny: tuple[str, Path]) -> None:
    name, folder = tiny
    root = folder / VARIANTS[name].experts[0].folder
    index = json.loads((root / DIT_FILES[-1]).read_text())
    held = {}
    for shard in SHARDS:
        with safe_open(root / shard, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == held
    config = json.loads((root / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["in_dim"]) == (96, 8, VARIANTS[name].dit.in_dim)
    assert config["model_type"] == name.split("-")[0]


def test_every_network_loads(tiny: tuple[str, Path]) -> None:
    name, folder = tiny
    variant = VARIANTS[name]
    models = [load_wan(name, folder, expert=expert.name) for expert in variant.experts]
    assert all(len(model.blocks) == 6 and model.num_heads == 8 for model in models)
    if len(models) == 2:
        assert not torch.equal(models[0].head.head.weight, models[1].head.head.weight)
    assert load_text_encoder(folder).text_dim == models[0].text_embedding[0].in_features
    if variant.dit.clip_dim is not None:
        assert load_clip(folder).clip_dim == models[0].img_emb.proj[0].normalized_shape[0]
    load_vae(folder, variant)


def test_latents_of_pictures_are_sized_and_smooth(tiny: tuple[str, Path]) -> None:
    name, folder = tiny
    vae = load_vae(folder, VARIANTS[name])
    latents = vae.encode(_pictures(256, num=2)).transpose(0, 1)  # (C, B, F, h, w)
    assert latents.shape[0] == VARIANTS[name].vae.latent_channels
    std = latents.flatten(1).std(dim=1)
    assert std.min() > 0.3 and std.max() < 2
    assert latents.flatten(1).mean(dim=1).abs().max() < 1.5
    centred = (latents - latents.mean(dim=(1, 2, 3, 4), keepdim=True)) / std.view(-1, 1, 1, 1, 1)
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean()
    assert neighbours > 0.4
    correlation = torch.corrcoef(latents.flatten(1)) - torch.eye(len(latents))
    assert correlation.abs().mean() < 0.4


def test_latents_tell_the_picture(tiny: tuple[str, Path]) -> None:
    name, folder = tiny
    vae, videos = load_vae(folder, VARIANTS[name]), _pictures(256, num=2)
    latents = vae.encode(videos)[:, :, 0].transpose(0, 1).flatten(1).T  # (samples, C)
    coarse = torch.nn.functional.avg_pool2d(videos[:, :, 0], vae.stride[1]).transpose(0, 1).flatten(1).T
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    error = inputs @ torch.linalg.lstsq(inputs, coarse).solution - coarse
    assert error.var() < 0.1 * coarse.var()


def test_faces_move_the_motion_vectors(tmp_path: Path) -> None:
    init_tiny("animate-14b", tmp_path / "tiny")
    with torch.no_grad():
        faces = _pictures(512, num=1, num_frames=4)
        vectors = encode_motion(load_motion_encoder(tmp_path / "tiny", VARIANTS["animate-14b"]), faces)
    assert vectors.shape == (1, 4, 32) and vectors.std(dim=1).mean() > 0.02


def test_same_seed_same_weights(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        init_tiny("t2v-1.3b", tmp_path / folder, seed=seed)
    a, b, c = ((tmp_path / folder / SHARDS[0]).read_bytes() for folder in "abc")
    assert a == b != c


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    init_tiny("t2v-1.3b", tmp_path / "out")
    assert torch.equal(state, torch.get_rng_state())


def test_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder: give a new one"):
        init_tiny("t2v-1.3b", tmp_path)
    with pytest.raises(ValueError, match="did you mean t2v-a14b"):
        init_tiny("t2v-a14", tmp_path / "new")


@pytest.mark.parametrize("name", ["t2v-1.3b"])
def test_denoiser_learns_quickly(name: str, tmp_path: Path) -> None:
    """AdamW at the recipe's learning rate brings the loss on one noisy latent well below its start."""
    init_tiny(name, tmp_path / "out")
    model = load_wan(name, tmp_path / "out")
    latents = load_vae(tmp_path / "out", VARIANTS[name]).encode(_pictures(64, num=2))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    text = torch.randn(2, 8, 64, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        velocity = model(0.5 * latents + 0.5 * noise, torch.tensor([500.0, 500.0]), text)
        loss = (velocity - (noise - latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 3
    assert losses[-1] < 0.5 * losses[0]
