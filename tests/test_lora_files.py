"""LoRA files of every tool are read to one thing; what a run starts from must be the recipe's rank and alpha."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from wan_accel.lora import LoraSettings
from wan_accel.lora_files import DIFFUSERS_METADATA, find_lora, holds_pair, read_lora
from wan_accel.lora_start import starting_adapter
from wan_accel.models.errors import CheckpointError

RANK = 4
MODULES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
}


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(RANK, 6, generator=generator), torch.randn(8, RANK, generator=generator))
        for name in MODULES
    }


def write(folder: Path, layout: str, alpha: float) -> Path:
    """A LoRA of alpha / r as each tool writes it, its alpha where the layout has a place for it."""
    state: dict[str, Tensor] = {}
    path = folder / f"{layout}.safetensors"
    metadata = {}
    for name, (down, up) in pairs().items():
        if layout == "diffsynth":
            state |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up * alpha / RANK}
        elif layout == "comfyui":
            state |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
        elif layout == "diffusers":
            theirs = f"transformer.{MODULES[name]}"
            state |= {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}
            metadata = {DIFFUSERS_METADATA: json.dumps({"transformer.r": RANK, "transformer.lora_alpha": alpha})}
        else:
            state |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    if layout == "peft":
        path = folder / "peft"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": alpha, "bias": "none"}))
    save_file(state, path / "adapter_model.safetensors" if layout == "peft" else path, metadata=metadata)
    return path


def test_the_key_of_diffusers_settings_is_theirs() -> None:
    assert DIFFUSERS_METADATA == LORA_ADAPTER_METADATA_KEY


@pytest.mark.parametrize("layout", ["diffsynth", "comfyui", "diffusers", "peft"])
def test_every_layout_is_read_to_the_same_update(tmp_path: Path, layout: str) -> None:
    lora = read_lora(write(tmp_path, layout, 8.0))
    assert lora.layers.keys() == MODULES.keys()
    deltas = lora.deltas()
    for name, (down, up) in pairs().items():
        found_down, found_up = deltas[f"{name}.weight"]
        torch.testing.assert_close(found_up @ found_down, up @ down * 2)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "peft"])
def test_a_run_starts_from_the_same_update(tmp_path: Path, layout: str) -> None:
    settings = LoraSettings(r=RANK, lora_alpha=8.0)
    adapter = starting_adapter(read_lora(write(tmp_path, layout, 8.0)), settings)
    for name, (down, up) in pairs().items():
        found = adapter[f"{name}.lora_B.default.weight"] @ adapter[f"{name}.lora_A.default.weight"]
        torch.testing.assert_close(found * settings.scale, up @ down * 2)


def test_folded_alpha_counts_as_one_unless_the_file_says_it(tmp_path: Path) -> None:
    path = write(tmp_path, "diffsynth", 8.0)
    with pytest.raises(CheckpointError, match=r"rank 4 and alpha 4, the recipe r=4 and lora_alpha=8: set method\.r=4"):
        starting_adapter(read_lora(path), LoraSettings(r=RANK, lora_alpha=8.0))
    from safetensors.torch import load_file

    save_file(load_file(path), path, metadata={"alpha": "8.0", "rank": "4"})
    adapter = starting_adapter(read_lora(path), LoraSettings(r=RANK, lora_alpha=8.0))
    torch.testing.assert_close(adapter["blocks.1.ffn.0.lora_B.default.weight"], pairs()["blocks.1.ffn.0"][1])


@pytest.mark.parametrize("settings", [LoraSettings(r=8, lora_alpha=8.0), LoraSettings(r=4, lora_alpha=4.0)])
def test_another_rank_or_alpha_is_refused(tmp_path: Path, settings: LoraSettings) -> None:
    with pytest.raises(CheckpointError, match=r"set method\.r=4 and method\.lora_alpha=8"):
        starting_adapter(read_lora(write(tmp_path, "peft", 8.0)), settings)


def test_what_is_not_understood_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_blocks_0.hada_w1_a": torch.zeros(2, 2), "blocks.0.ffn.0.lora_A.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError) as caught:
        read_lora(path)
    assert "2 of its 2 tensors are not understood" in str(caught.value)
    assert "unknown lora_unet_blocks_0.hada_w1_a (2, 2)" in str(caught.value)
    assert "blocks.0.ffn.0 has only lora_A" in str(caught.value)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="0 of its 0 tensors"):
        read_lora(path)
    with pytest.raises(CheckpointError, match="does not exist: give a"):
        find_lora(tmp_path / "nothing")


def test_peft_settings_that_are_not_read_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "peft", 8.0)
    (path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora=True, which is not read"):
        read_lora(path)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="has no r and lora_alpha"):
        read_lora(path)


def test_a_pair_is_told_apart_by_its_names(tmp_path: Path) -> None:
    for name in ("x_high_noise.safetensors", "x_low_noise.safetensors"):
        save_file({"blocks.0.ffn.0.diff_b": torch.zeros(2)}, tmp_path / name)
    assert find_lora(tmp_path, "low").name == "x_low_noise.safetensors"
    with pytest.raises(CheckpointError, match="no LoRA of the expert 'default' alone"):
        find_lora(tmp_path)
    (tmp_path / "x_high_noise.safetensors").unlink()
    (tmp_path / ".cache").mkdir()  # as `hf download` leaves it
    assert find_lora(tmp_path).name == "x_low_noise.safetensors"


def test_a_file_of_both_experts_is_read_for_the_one_that_is_asked_for(tmp_path: Path) -> None:
    names = [f"blocks.0.attn1.to_q.lora_{half}.weight" for half in "AB"]
    first, second = ({f"{part}.{name}": torch.full((2, 2), value) for name in names}
                     for part, value in (("transformer", 1.0), ("transformer_2", 2.0)))  # fmt: skip
    settings = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer_2.r": 2, "transformer_2.lora_alpha": 8}
    path = tmp_path / "x.safetensors"
    save_file(first | second, path, metadata={DIFFUSERS_METADATA: json.dumps(settings)})
    assert holds_pair(path)
    for expert, value, scale in (("high", 1, 3), ("low", 2, 4)):
        layer = read_lora(find_lora(path, expert), expert).layers["blocks.0.self_attn.q"]
        assert layer.scale == scale and torch.equal(layer.down, torch.full((2, 2), float(value)))
    with pytest.raises(CheckpointError, match=r"holds both experts of a pair \(2 tensors of transformer, 2 of "):
        read_lora(path)
    save_file(second, path)
    assert not holds_pair(path)
    assert torch.equal(read_lora(path, "low").layers["blocks.0.self_attn.q"].down, torch.full((2, 2), 2.0))
    with pytest.raises(CheckpointError, match=r"holds the low-noise expert of a pair .* high-noise one is asked"):
        read_lora(path, "high")
    save_file(first, path)  # how tools write a LoRA of either expert
    for expert in ("default", "high", "low"):
        assert torch.equal(read_lora(path, expert).layers["blocks.0.self_attn.q"].down, torch.full((2, 2), 1.0))


def test_differences_are_kept_for_fusing_and_refused_as_a_start(tmp_path: Path) -> None:
    state = {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.ones(2, 3),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(4, 2),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(4),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(5),
    }
    save_file(state, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    assert lora.differences.keys() == {"blocks.0.ffn.0.bias", "blocks.0.norm3.weight"}
    with pytest.raises(CheckpointError, match=r"changes 2 tensors besides its LoRA layers"):
        starting_adapter(lora, LoraSettings(r=2, lora_alpha=2))


def test_layers_that_diffusers_splits_are_joined(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    down, other, up, down_up = (torch.randn(2, 6, generator=generator) for _ in range(4))
    names = [f"transformer.face_adapter.3.{layer}" for layer in ("to_k", "to_v")]
    for second, rank in ((down, 2), (other, 4)):
        state = {f"{names[0]}.lora_A.weight": down, f"{names[0]}.lora_B.weight": up.T.contiguous()}
        state |= {f"{names[1]}.lora_A.weight": second.clone(), f"{names[1]}.lora_B.weight": down_up.T.contiguous()}
        save_file(state, tmp_path / "x.safetensors")
        layer = read_lora(tmp_path / "x.safetensors").layers["face_adapter.fuser_blocks.3.linear1_kv"]
        assert layer.rank == rank
        torch.testing.assert_close(layer.up @ layer.down, torch.cat([up.T @ down, down_up.T @ second]))
