"""An export gives, in the tool that it is for, the outputs of the trained denoiser."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import tiny_state, write_checkpoint
from diffsynth.utils.lora.general import GeneralLoRALoader
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers_wan import SIZES, diffusers_output, load_into, save_repository, wan_inputs
from exports import TOLERANCE, lora_tensors, modules, with_lora, write_run
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_accel import export_full, export_lora
from wan_accel.cli import main
from wan_accel.export import export
from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.lora_files import read_lora
from wan_accel.lora_start import starting_adapter
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit, dit_size_from_shapes
from wan_accel.models.loading import load_wan
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import get_variant
from wan_accel.original_files import INDEX_NAME


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", "t2v-1.3b")


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, Tensor]:
    return lora_tensors(tiny_state("t2v-1.3b"), modules(2))


@pytest.fixture(scope="module")
def run(base: Path, trained: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("lora") / "run", base, "t2v-1.3b", trained)


@pytest.fixture(scope="module")
def expected(base: Path, trained: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = with_lora("t2v-1.3b", base, trained)(**wan_inputs())
        assert not torch.allclose(output, load_wan("t2v-1.3b", base)(**wan_inputs()), **TOLERANCE)
    return output


def diffusers_model(base: Path) -> WanTransformer3DModel:
    """diffusers' transformer with the base's weights, renamed by diffusers."""
    reader = CheckpointReader(base)
    model = WanTransformer3DModel(**SIZES, num_layers=2)
    model.load_state_dict(convert_wan_transformer_to_diffusers({name: reader.read(name) for name in reader.shapes}))
    return model.eval()


def test_the_adapter_of_a_run_computes_this(base: Path, trained: dict[str, Tensor], expected: Tensor) -> None:
    model = inject_lora(load_wan("t2v-1.3b", base), LoraSettings(r=4, lora_alpha=8.0), get_variant("t2v-1.3b"))
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(**wan_inputs()), expected, **TOLERANCE)


@pytest.mark.parametrize("layout", ["diffsynth", "comfyui"])
def test_diffsynth_computes_the_same(base: Path, run: Path, expected: Tensor, tmp_path: Path, layout: str) -> None:
    path = export(run, layout=layout, output=tmp_path / "x.safetensors")
    reader = CheckpointReader(base)
    dit = build_dit(dit_size_from_shapes(reader.shapes, num_heads=8))
    dit.load_state_dict({name: reader.read(name) for name in reader.shapes})
    GeneralLoRALoader().fuse_lora_to_base_model(dit, load_file(path))
    with torch.no_grad():
        torch.testing.assert_close(WanDenoiser(dit)(**wan_inputs()), expected, **TOLERANCE)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_diffusers_computes_the_same(base: Path, run: Path, expected: Tensor, tmp_path: Path, layout: str) -> None:
    path = export(run, layout=layout, output=tmp_path / "x.safetensors")
    transformer = diffusers_model(base)
    load_into(transformer, path)
    torch.testing.assert_close(diffusers_output(transformer, wan_inputs()), expected, **TOLERANCE)


def test_peft_computes_the_same(base: Path, run: Path, expected: Tensor, tmp_path: Path) -> None:
    folder = export(run, layout="peft", output=tmp_path / "peft")
    assert 'load_wan("t2v-1.3b", "<checkpoint>"), "<folder>")' in (folder / "README.md").read_text()
    model = PeftModel.from_pretrained(load_wan("t2v-1.3b", base), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(model(**wan_inputs()), expected, **TOLERANCE)


@pytest.mark.parametrize("layout", ["diffsynth", "comfyui", "diffusers", "peft"])
def test_a_run_goes_on_from_any_export(run: Path, trained: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    path = export(run, layout=layout, output=tmp_path / ("x" if layout == "peft" else "x.safetensors"))
    adapter = starting_adapter(read_lora(path), LoraSettings(r=4, lora_alpha=8.0))
    assert adapter.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-6, atol=0)


def test_bf16_files_say_what_they_are(base: Path, run: Path, tmp_path: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(
        "variant: t2v-1.3b\nmodel: {checkpoint: x}\nmethod: {kind: lora, r: 4}\ndata: {latents: y}\n"
        "training: {output_dir: z}\n"
    )
    try:
        path = export(run, output=tmp_path / "x.safetensors", dtype=torch.bfloat16)
    finally:
        recipe.unlink()
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    wanted = {"variant": "t2v-1.3b", "expert": "default", "rank": "4", "alpha": "8.0", "step": "7", "method": "lora"}
    assert wanted.items() <= metadata.items()
    assert len(metadata["recipe"]) == 16
    card = (tmp_path / "x.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert f"| base | {base.name} |" in card and str(base) not in card  # cards are published, paths are not
    assert yaml.safe_load(front)["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B"
    assert yaml.safe_load(front)["base_model_relation"] == "adapter"
    assert yaml.safe_load(front)["tags"] == ["wan", "wan2.1", "wan-accel", "lora"]
    assert 'pipe.load_lora(pipe.dit, "x.safetensors", alpha=1)' in body
    assert "| rank | 4 |" in body and "| read back by | diffsynth |" in body


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, WanTransformer3DModel], dict[str, dict]]:
    """A run that trained a LoRA on both experts of a pair, their base, and the tensors of each."""
    folder = tmp_path_factory.mktemp("pair")
    models = save_repository(folder / "model", "t2v-a14b")
    tensors = {
        expert: lora_tensors(tiny_state("t2v-a14b"), modules(2), seed) for seed, expert in enumerate(("high", "low"))
    }
    state = {f"{expert}.{name}": tensor for expert, part in tensors.items() for name, tensor in part.items()}
    write_run(folder / "run", folder / "model", "t2v-a14b", state, expert="both")
    return folder, models, tensors


def test_a_pair_is_exported_as_two_files(pair: tuple[Path, dict, dict], tmp_path: Path) -> None:
    folder, _, tensors = pair
    out = export(folder / "run", layout="diffusers", output=tmp_path / "pair")
    names = {path.name for path in out.iterdir()}
    stem = "t2v-a14b_{}_noise-step7-lora-diffusers.safetensors"
    assert names == {"README.md", stem.format("high"), stem.format("low")}
    card = (out / "README.md").read_text()
    assert f'weight_name="{stem.format("low")}", load_into_transformer_2=True' in card
    for expert, place in (("high", "transformer"), ("low", "transformer_2")):
        transformer = WanTransformer3DModel.from_pretrained(folder / "model" / place)
        load_into(transformer, out / stem.format(expert))
        with torch.no_grad():
            ours = with_lora("t2v-a14b", folder / "model", tensors[expert], expert=expert)(**wan_inputs())
        torch.testing.assert_close(diffusers_output(transformer, wan_inputs()), ours, **TOLERANCE)


def test_a_merged_pair_is_a_checkpoint_of_two_folders(
    pair: tuple[Path, dict, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, tensors = pair
    monkeypatch.setattr(export_full, "MAX_SHARD_BYTES", 200_000)
    out = export(folder / "run", merge=True, output=tmp_path / "merged")
    card = (out / "README.md").read_text()
    assert all(f"The folder `{expert}_noise_model` replaces that (" in card for expert in ("high", "low"))
    for expert in ("high", "low"):
        shards = list((out / f"{expert}_noise_model").glob("*.safetensors"))
        assert len(shards) > 2 and (out / f"{expert}_noise_model" / INDEX_NAME).is_file()
        merged = load_wan("t2v-a14b", out, expert=expert)
        wanted = with_lora("t2v-a14b", folder / "model", tensors[expert], expert=expert)
        with torch.no_grad():
            torch.testing.assert_close(merged(**wan_inputs()), wanted(**wan_inputs()), **TOLERANCE)
    with pytest.raises(ValueError, match=r"holds the low-noise expert of t2v-a14b, model\.expert=high"):
        load_wan("t2v-a14b", out / "low_noise_model", expert="high")


def test_merged_weights_are_diffusers_too(base: Path, run: Path, expected: Tensor, tmp_path: Path) -> None:
    out = export(run, merge=True, output=tmp_path / "merged")
    assert json.loads((out / "config.json").read_text())["num_heads"] == 8
    torch.testing.assert_close(diffusers_output(diffusers_model(out), wan_inputs()), expected, **TOLERANCE)
    card = (out / "README.md").read_text()
    assert "base_model_relation: finetune" in card and "These files replace the DiT's (config.json and " in card


def test_moving_averages_are_exported_instead(base: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    ema = {name: tensor * 0.5 for name, tensor in trained.items()}
    run = write_run(tmp_path / "run", base, "t2v-1.3b", trained, ema=ema)
    layers = read_lora(export(run, ema=True, output=tmp_path / "ema.safetensors")).layers
    name = "blocks.1.ffn.2"
    assert torch.equal(layers[name].down, ema[f"{name}.lora_A.default.weight"])


def test_full_weights_are_read_by_diffsynth_and_diffusers(base: Path, tmp_path: Path) -> None:
    from diffsynth.core.loader.model import load_model
    from diffsynth.models.wan_video_dit import WanModel

    state = {name: tensor + 0.01 for name, tensor in tiny_state("t2v-1.3b").items()}
    run = write_run(tmp_path / "run", base, "t2v-1.3b", state, method="full")
    out = export(run, output=tmp_path / "full", dtype=torch.bfloat16)
    sizes = dict(dim=96, in_dim=16, ffn_dim=128, out_dim=16, text_dim=24, freq_dim=32, eps=1e-6, patch_size=(1, 2, 2),
                 num_heads=8, num_layers=2, has_image_input=False)  # fmt: skip
    paths = [str(path) for path in sorted(out.glob("*.safetensors"))]
    dit = load_model(WanModel, paths, config=sizes, torch_dtype=torch.bfloat16)
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
    diffusers_model(out)  # refuses missing and unknown names


def test_a_card_names_the_adapter_only_for_its_layers(base: Path, tmp_path: Path) -> None:
    """Layers of the DiT outside its blocks are the DiT's."""
    tensors = lora_tensors(tiny_state("t2v-1.3b"), ["text_embedding.0", "head.head"])
    path = export(write_run(tmp_path / "run", base, "t2v-1.3b", tensors), output=tmp_path / "x.safetensors")
    card = path.with_suffix(".md").read_text()
    assert "pipe.load_lora(pipe.dit, " in card and "animate_adapter" not in card


def test_what_an_export_left_that_was_killed_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"x\.tmp exists, which an export leaves that was killed or is still running"):
        export(run, output=tmp_path / "x")
    assert (tmp_path / "x.tmp" / "mine").read_text() == "mine"


def test_what_cannot_be_exported(base: Path, run: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no moving average: train with method\.ema"):
        export(run, ema=True, output=tmp_path / "x")
    with pytest.raises(ValueError, match=r"'original' does not fit a lora checkpoint: .* with --merge"):
        export(run, layout="original", output=tmp_path / "x")
    with pytest.raises(ValueError, match=r"'peft' does not fit a merged checkpoint: use original"):
        export(run, layout="peft", merge=True, output=tmp_path / "x")
    with pytest.raises(ValueError, match=r"this export is a folder"):
        export(run, layout="peft", output=tmp_path / "x.safetensors")
    full = write_run(tmp_path / "full", base, "t2v-1.3b", tiny_state("t2v-1.3b"), method="full")
    with pytest.raises(ValueError, match=r"--merge adds a LoRA to its base"):
        export(full, merge=True)
    odd = trained | {f"pose.x.lora_{half}.default.weight": torch.ones(4, 4) for half in "AB"}
    unknown = write_run(tmp_path / "odd", base, "t2v-1.3b", odd)
    with pytest.raises(ValueError, match=r"layout diffusers has no names for 1 of 21 layers, e\.g\. pose\.x"):
        export(unknown, layout="diffusers", output=tmp_path / "x.safetensors")


def test_a_full_disk_is_seen_before(base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    size = sum(tensor.nbytes for tensor in tiny_state("t2v-1.3b").values())
    for dtype, needed in ((None, size), (torch.bfloat16, size / 2)):
        with pytest.raises(ValueError, match=rf"the export needs {needed / 1e9:.2f} GB, 0\.00 GB are free: free some"):
            export(run, merge=True, dtype=dtype, output=tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_a_damaged_checkpoint_is_said_in_one_line(
    base: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "run", base, "t2v-1.3b", tiny_state("t2v-1.3b"), method="full", engine=engine)
    file = next((run / "checkpoint-7").rglob("*.distcp" if engine == "single" else "*rank_1*_optim_states.pt"))
    for content in (file.read_bytes()[: file.stat().st_size // 2], None):
        file.unlink() if content is None else file.write_bytes(content)
        assert main(["export", str(run), "--output", str(tmp_path / "x")]) == 2
        (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "is damaged or incomplete" in message and "use another checkpoint of the run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tool_that_is_not_installed_is_said_not_needed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails now
    with caplog.at_level("INFO"):
        export(run, layout="diffusers", output=tmp_path / "x.safetensors")
    assert "diffusers is not installed here, so it was not asked" in caplog.text
    assert "diffusers is not installed here" in (tmp_path / "x.md").read_text()


def test_a_file_that_a_tool_misreads_is_no_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_lora._NAMES, "diffsynth", "pipe.dit.{module}.lora_{half}.default.weight")
    with pytest.raises(RuntimeError, match=r"diffsynth's loader does not fuse blocks\.0\.self_attn\.q as trained"):
        export(run, layout="diffsynth", output=tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    assert main(["export", str(run), "--output", str(tmp_path / "x.safetensors")]) == 2  # and no trace


def test_a_disk_that_fills_up_meanwhile_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(["export", str(run), "--output", str(tmp_path / "x")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_into_the_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(run), "--layout", "comfyui", "--dtype", "bfloat16"]) == 0
    folder = run / "export" / "t2v-1.3b-step7-lora-comfyui"
    assert str(folder) in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", f"{folder.name}.safetensors"]
