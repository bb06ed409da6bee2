"""What a run starts from: the checkpoint, a file over it, fused LoRAs, an adapter to go on from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_state, write_checkpoint
from diffusers_wan import save_repository
from safetensors.torch import save_file
from torch import Tensor

from wan_accel.assemble import Techniques, assemble
from wan_accel.lora import LoraSettings
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.errors import CheckpointError
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import get_variant
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.recipe.schema import Data, FusedLora, Method, Model, Recipe
from wan_accel.weights import fuse, open_weights

LORA = LoraSettings(r=4, lora_alpha=8.0)
LAYERS = ["blocks.0.self_attn.q", "blocks.1.self_attn.q"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", "t2v-1.3b")


@pytest.fixture(scope="module")
def animate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("animate")
    save_repository(folder, "animate-14b")
    return folder


def recipe(base: Path, variant: str = "t2v-1.3b", *, init_from: Path | None = None, **model: Any) -> Recipe:
    return Recipe(
        variant=variant,
        model=Model(checkpoint=str(base), **model),
        method=Method(kind="full", init_from=None if init_from is None else str(init_from)),
        data=Data(latents="latents"),
    )


def started(recipe: Recipe, lora: LoraSettings | None = None) -> WanDenoiser:
    return assemble(
        get_variant(recipe.variant),
        open_weights(recipe, "default", lora),
        Techniques(lora=lora),
        engine="single",
        dims=ParallelDims(world_size=1, ulysses=1),
        device=torch.device("cpu"),
    )


def lora_file(path: Path, rank: int = 4, layers: list[str] = LAYERS) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a LoRA in DiffSynth's layout; returns its pairs."""
    generator = torch.Generator().manual_seed(5)
    pairs = {
        name: (torch.randn(rank, 96, generator=generator), torch.randn(96, rank, generator=generator))
        for name in layers
    }
    state = {f"{name}.lora_A.default.weight": down for name, (down, _) in pairs.items()}
    state |= {f"{name}.lora_B.default.weight": up for name, (_, up) in pairs.items()}
    save_file(state, path, metadata={"alpha": "8.0"})
    return pairs


def test_full_training_starts_from_a_file_of_diffsynth(base: Path, tmp_path: Path) -> None:
    trained = {name: tensor + 1 for name, tensor in tiny_state("t2v-1.3b").items()}
    save_file({f"pipe.dit.{name}": tensor for name, tensor in trained.items()}, tmp_path / "step-9.safetensors")
    model = started(recipe(base, init_from=tmp_path / "step-9.safetensors"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_a_file_of_the_adapter_alone_leaves_the_dit_to_the_checkpoint(animate: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(animate / "transformer")
    state = {name: reader.read(name) for name in reader.shapes}
    prefixes = ("pose_patch_embedding.", "face_")
    adapter = {name: tensor + 1 for name, tensor in state.items() if name.startswith(prefixes)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    for name, parameter in started(recipe(animate, "animate-14b", init_from=tmp_path)).named_parameters():
        assert torch.equal(parameter, adapter.get(name, state[name])), name
    del adapter["face_encoder.out_proj.bias"]
    save_file(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"missing face_encoder\.out_proj\.bias"):
        started(recipe(animate, "animate-14b", init_from=tmp_path))


def test_a_lora_starts_from_a_file(base: Path, tmp_path: Path) -> None:
    pairs = lora_file(tmp_path / "x.safetensors")
    settings = dataclasses.replace(LORA, target_modules=("self_attn.q",))
    model = started(recipe(base, init_from=tmp_path), settings)
    state = dict(model.named_parameters())
    for name, (down, up) in pairs.items():
        assert torch.equal(state[f"{name}.lora_A.default.weight"], down)
        torch.testing.assert_close(state[f"{name}.lora_B.default.weight"] * settings.scale, up)
        assert state[f"{name}.lora_B.default.weight"].requires_grad


def test_a_start_for_other_layers_is_refused_with_all_of_them(base: Path, tmp_path: Path) -> None:
    lora_file(tmp_path / "x.safetensors", layers=["blocks.0.self_attn.q", "blocks.7.self_attn.q"])
    with pytest.raises(CheckpointError) as caught:
        started(recipe(base, init_from=tmp_path), dataclasses.replace(LORA, target_modules=("self_attn.q",)))
    assert "does not fit method.target_modules (4 tensors)" in str(caught.value)
    assert "missing blocks.1.self_attn.q.lora_A.default.weight" in str(caught.value)
    assert "unknown blocks.7.self_attn.q.lora_B.default.weight" in str(caught.value)


def test_loras_are_fused_into_the_base_in_turn(base: Path, tmp_path: Path) -> None:
    pairs = lora_file(tmp_path / "x.safetensors")
    bias = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(128)}
    save_file(bias, tmp_path / "y.safetensors")
    paths = {"x.safetensors": 0.5, "y.safetensors": 1.0}
    fused = [FusedLora(path=str(tmp_path / name), scale=scale) for name, scale in paths.items()]
    reader = open_weights(recipe(base, fuse_loras=fused), "default", None)
    state = tiny_state("t2v-1.3b")
    for name, (down, up) in pairs.items():
        expected = state[f"{name}.weight"] + 0.5 * up @ down
        torch.testing.assert_close(reader.read(f"{name}.weight"), expected)
        torch.testing.assert_close(reader.read(f"{name}.weight", slice(3, 9)), expected[3:9])
    torch.testing.assert_close(reader.read("blocks.0.ffn.0.bias"), state["blocks.0.ffn.0.bias"] + 1)
    assert torch.equal(reader.read("head.head.weight"), state["head.head.weight"])


def test_a_lora_of_another_model_is_not_fused(base: Path, tmp_path: Path) -> None:
    lora_file(tmp_path / "x.safetensors", layers=["blocks.9.self_attn.q"])
    with pytest.raises(CheckpointError, match=r"1 of 1 LoRA layers do not fit .*blocks\.9\.self_attn\.q\.weight"):
        open_weights(recipe(base, fuse_loras=[FusedLora(path=str(tmp_path))]), "default", None)


def test_what_does_not_exist_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"method\.init_from=.*none does not exist"):
        open_weights(recipe(base, init_from=tmp_path / "none"), "default", None)
    with pytest.raises(CheckpointError, match=r"LoRA .*none does not exist"):
        open_weights(recipe(base, init_from=tmp_path / "none"), "default", LORA)
    with pytest.raises(CheckpointError, match=r"nobody/nothing is neither a local .*wan-accel download"):
        open_weights(recipe(Path("nobody/nothing")), "default", None)


def test_the_other_experts_lora_is_refused(base: Path, tmp_path: Path) -> None:
    variant = get_variant("t2v-a14b")
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(128)}, tmp_path / "x_low_noise.safetensors")
    with pytest.raises(CheckpointError, match=r"holds the low-noise expert of t2v-a14b, model\.expert=high was asked"):
        fuse(CheckpointReader(base), FusedLora(path=str(tmp_path / "x_low_noise.safetensors")), variant, "high")


def test_a_lora_that_says_another_variant_is_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"blocks.0.ffn.0.diff_b": torch.ones(128)}
    for said, warnings in (("t2v-1.3b", 0), ("animate-14b", 1)):
        caplog.clear()
        save_file(state, tmp_path / "x.safetensors", metadata={"variant": said})
        open_weights(recipe(base, fuse_loras=[FusedLora(path=str(tmp_path / "x.safetensors"))]), "default", None)
        messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(messages) == warnings
    assert "x.safetensors was trained on animate-14b and is put on t2v-1.3b: see that this is meant" in messages[0]


def test_full_weights_are_no_lora_and_a_lora_no_full_weights(base: Path, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in tiny_state("t2v-1.3b").items()}
    save_file(state, tmp_path / "full.safetensors")
    with pytest.raises(CheckpointError, match=r"is no LoRA: none of its 69 tensors .* with method\.kind=full"):
        open_weights(recipe(base, init_from=tmp_path / "full.safetensors"), "default", LORA)
    lora_file(tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"is a LoRA: .* with model\.fuse_loras, or set"):
        started(recipe(base, init_from=tmp_path / "lora.safetensors"))
