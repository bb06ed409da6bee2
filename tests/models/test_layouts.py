"""A DiT in the layouts of other tools gives the outputs of those tools; what does not fit is listed at once."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import tiny_state, write_checkpoint
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel
from diffusers_wan import animate_inputs, diffusers_output, save_repository, wan_inputs
from safetensors.torch import load_file, save_file

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.diffusers_size import diffusers_arguments
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.errors import CheckpointError
from wan_accel.models.layouts import diffusers_modules, original_module, original_sources
from wan_accel.models.loading import build_denoiser, dit_folder, load_wan
from wan_accel.models.reader import CheckpointReader, is_constant
from wan_accel.models.safetensors_file import SafetensorsFile
from wan_accel.models.variants import get_variant

# Both compute in fp32, in another order of operations.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("t2v")
    return folder, save_repository(folder, "t2v-a14b")


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_diffusers_pair_gives_diffusers_outputs(t2v: tuple[Path, dict], expert: str) -> None:
    folder, models = t2v
    ours = load_wan("t2v-a14b", folder, expert=expert)
    inputs = wan_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs), diffusers_output(models[expert], inputs), **TOLERANCE)


def test_diffusers_animate_gives_diffusers_outputs(tmp_path: Path) -> None:
    model = save_repository(tmp_path, "animate-14b")["default"]
    ours = load_wan("animate-14b", tmp_path, with_motion_encoder=True)
    inputs = animate_inputs()
    with torch.no_grad():
        expected, found = diffusers_output(model, inputs), ours(**inputs)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        faceless = inputs | {"face_pixel_values": -torch.ones(1, 3, 1, 512, 512)}
        assert not torch.allclose(diffusers_output(model, faceless), expected, **TOLERANCE)  # faces do count


def test_rows_of_every_tensor_are_slices_of_the_whole(tmp_path: Path) -> None:
    save_repository(tmp_path, "animate-14b")
    reader = CheckpointReader(tmp_path / "transformer")
    joined = "face_adapter.fuser_blocks.0.linear1_kv.weight"  # two tensors in the file
    assert reader.shapes[joined] == (192, 96)
    assert reader.shapes["motion_encoder.enc.net_app.convs.0.1.bias"] == (1, 2, 1, 1)
    for name, shape in reader.shapes.items():
        whole = reader.read(name)
        assert whole.shape == shape
        if shape:
            for start, stop in ((0, shape[0] // 2), (shape[0] // 2 - 1, shape[0]), (shape[0], shape[0])):
                rows = slice(max(start, 0), stop)
                assert torch.equal(reader.read(name, rows), whole[rows]), name
                assert torch.equal(read_into(reader, name, rows, torch.empty_like(whole[rows])), whole[rows]), name
        assert torch.equal(read_into(reader, name, None, torch.empty(shape, dtype=torch.float64)), whole.double())
        strided = torch.empty(*shape, 2)[..., 0]
        assert torch.equal(read_into(reader, name, None, strided), whole), name


def read_into(reader: CheckpointReader, name: str, rows: slice | None, target: torch.Tensor) -> torch.Tensor:
    reader.read_into(name, target.fill_(torch.nan), rows)
    return target


def test_a_file_that_is_cut_while_it_is_read_is_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(8, 8)}, file)
    stored = SafetensorsFile(file)
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 16)
    with pytest.raises(OSError, match="ends inside of a: it was changed"):
        stored.read_into("a", None, torch.empty(8, 8))


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "dit.", "model.", "diffusion_model.", "model.diffusion_model."])
def test_one_file_of_diffsynth_or_comfyui_is_read(tmp_path: Path, prefix: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in tiny_state("t2v-1.3b").items()}
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "step-10.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 8}))
    model = load_wan("t2v-1.3b", tmp_path / "step-10.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_everything_that_does_not_fit_is_listed_at_once(t2v: tuple[Path, dict], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(t2v[0] / "transformer", folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        state.pop("blocks.1.attn1.to_q.weight", None)
        if "proj_out.bias" in state:
            state |= {"proj_out.bias": torch.zeros(3), "blocks.0.attn3.to_q.weight": torch.zeros(2, 2)}
        save_file(state, path)
    with pytest.raises(CheckpointError) as caught, torch.device("meta"):
        build_denoiser(get_variant("t2v-a14b"), CheckpointReader(folder))
    message = str(caught.value)
    assert "does not fit the model (3 tensors)" in message
    assert "missing blocks.1.self_attn.q.weight (96, 96)" in message
    assert "unknown blocks.0.attn3.to_q.weight (2, 2)" in message
    assert "head.head.bias has shape (3,), expected (64,)" in message


def test_half_of_a_split_layer_is_missing_not_filled(tmp_path: Path) -> None:
    save_repository(tmp_path, "animate-14b")
    for path in (tmp_path / "transformer").glob("*.safetensors"):
        state = load_file(path)
        state.pop("face_adapter.0.to_v.weight", None)
        save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_wan("animate-14b", tmp_path)
    assert "missing face_adapter.fuser_blocks.0.linear1_kv.weight (192, 96)" in str(caught.value)
    assert "unknown face_adapter.0.to_k.weight (96, 96)" in str(caught.value)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t2v-1.3b")
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file({"head.head.bias": torch.zeros(64)}, folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"head.head.bias is in .* and in model.fp16.safetensors"):
        CheckpointReader(folder)
    save_file({"dit.x": torch.zeros(1), "x": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"are both x: keep one"):
        CheckpointReader(tmp_path / "two.safetensors")


def test_the_other_expert_is_refused(tmp_path: Path) -> None:
    variant = get_variant("t2v-a14b")
    tensor = {"head.head.bias": torch.zeros(1)}
    for folder, said in (("high_noise_model", "high"), ("low_noise_model", "high")):
        (tmp_path / folder).mkdir()
        save_file(tensor, tmp_path / folder / "model.safetensors", metadata={"expert": said})
    assert dit_folder(tmp_path, variant, "high") == tmp_path / "high_noise_model"
    with pytest.raises(CheckpointError, match=r"holds the high-noise expert of t2v-a14b, model.expert=low was asked"):
        dit_folder(tmp_path, variant, "low")
    (tmp_path / "transformer_2").mkdir()
    save_file(tensor, tmp_path / "transformer_2" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer_2 holds the low-noise expert"):
        dit_folder(tmp_path / "transformer_2", variant, "high")
    lone = tmp_path / "wan2.2_t2v_low_noise_14B.safetensors"
    save_file(tensor, lone)
    assert dit_folder(lone, variant, "low") == lone
    with pytest.raises(CheckpointError, match=r"set model.expert=low"):
        dit_folder(lone, variant, "high")


# What the released diffusers repositories have in their config.json beside the defaults.
RELEASED = {
    "t2v-a14b": {},
    "i2v-a14b": {"in_channels": 36},
    "ti2v-5b": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
    },
    "t2v-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "animate-14b": {"added_kv_proj_dim": 5120},
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_all_mapped(name: str) -> None:
    variant = get_variant(name)
    adapter = None
    with torch.device("meta"):
        if variant.has_animate_adapter:
            theirs: torch.nn.Module = WanAnimateTransformer3DModel(**RELEASED[name])
            adapter = build_animate_adapter(AnimateSize(dim=5120, num_heads=40, num_face_blocks=8))
        else:
            theirs = WanTransformer3DModel(**RELEASED[name])
        ours = WanDenoiser(build_dit(variant.dit), adapter, with_motion_encoder=adapter is not None)
    found = original_sources({key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()})
    wanted = {key: tuple(parameter.shape) for key, parameter in ours.named_parameters() if not is_constant(key)}
    assert {key: source.shape for key, source in found.items()} == wanted
    kind, arguments = diffusers_arguments(variant, SimpleNamespace(shapes=wanted, num_heads=None))  # type: ignore[arg-type]
    assert kind == type(theirs).__name__
    with torch.device("meta"):
        again = type(theirs)(**arguments).state_dict()
    assert {key: tensor.shape for key, tensor in again.items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }


def test_every_module_goes_there_and_back() -> None:
    for module in ("blocks.12.cross_attn.k_img", "head.head", "face_adapter.fuser_blocks.3.linear1_kv"):
        parts = diffusers_modules(module)
        assert parts is not None
        assert [original_module(part) for part in parts] == [(module, index) for index in range(len(parts))]
    assert diffusers_modules("blocks.0.adaln") is None
    assert original_module("blocks.0.attn3.to_q") is None
