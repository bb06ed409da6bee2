"""The shipped recipe for a pair, from clips to exports of both experts, which are evaluated as the run was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clips import clip_row, write_clips

from wan_accel import cache, evaluate, train
from wan_accel.checkpoint import read_trained
from wan_accel.export import export
from wan_accel.lora_files import read_lora
from wan_accel.tiny import init_tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "t2v-a14b" / "lora_pair.yaml"
STEM = "t2v-a14b_{}_noise-step6-lora"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's run of six steps."""
    folder = tmp_path_factory.mktemp("pair")
    init_tiny("t2v-a14b", folder / "model")
    write_clips(folder / "clips", [clip_row(number) for number in range(4)])
    assert cache.main(arguments(folder)) == 0
    assert train.main(arguments(folder)) == 0
    return folder


def arguments(root: Path) -> list[str]:
    return [
        str(RECIPE), f"model.checkpoint={root}/model", f"data.clips={root}/clips", "parallel.ulysses=1",
        f"data.latents={root}/latents", f"training.output_dir={root}/run", "data.global_batch.samples=2",
        "training.max_steps=6", "training.save_steps=6", "training.logging_steps=1", "data.eval.fraction=0",
        "training.dataloader_num_workers=0", "training.warmup_steps=0", "training.learning_rate=1e-2",
        "validation.every_steps=6", "validation.sigmas=2", "model.torch_dtype=float32", "memory.compile=false",
        "method.ema={decay: 0.5}",
    ]  # fmt: skip


def logged(root: Path, step: int) -> dict[str, float]:
    """The trainer's own evaluation at a step."""
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["step"] == step and "eval_loss" in line)
    return {name: value for name, value in line.items() if name.startswith(("eval_loss", "eval_zero_loss"))}


def evaluated(root: Path, capsys: pytest.CaptureFixture, *options: str) -> dict[str, float]:
    capsys.readouterr()
    assert evaluate.main([*arguments(root), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.pop("num_draws") == 2 * 4 * 2  # two noise levels of each expert on four clips
    return found


def test_both_experts_are_trained_validated_and_exported(root: Path) -> None:
    trained = read_trained(root / "run" / "checkpoint-6")
    moved = {name.split(".")[0] for name, tensor in trained.items() if ".lora_B." in name and tensor.abs().sum() > 0}
    assert moved == {"high", "low"}
    before, after = logged(root, 0), logged(root, 6)
    assert {"eval_loss", "eval_loss_high", "eval_loss_low"} < after.keys()
    assert all(after[name] != pytest.approx(before[name], rel=1e-3) for name in ("eval_loss_high", "eval_loss_low"))
    files = sorted(export(root / "run", output=root / "export").glob("*.safetensors"))
    assert [file.stem for file in files] == [STEM.format("high"), STEM.format("low")]


def test_a_checkpoint_of_a_pair_is_evaluated_as_in_training(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluated(root, capsys, "--checkpoint", str(root / "run")) == pytest.approx(logged(root, 6), rel=1e-5)
    assert evaluated(root, capsys) == pytest.approx(logged(root, 0), rel=1e-5)  # the base alone


def one_file(pair: Path, path: Path) -> Path:
    """Put the two files of an export for diffusers into one, as diffusers writes a pair."""
    low = load_file(pair / f"{STEM.format('low')}-diffusers.safetensors")
    state = load_file(pair / f"{STEM.format('high')}-diffusers.safetensors")
    state |= {name.replace("transformer.", "transformer_2.", 1): tensor for name, tensor in low.items()}
    path.parent.mkdir()
    save_file(state, path)
    return path


@pytest.mark.parametrize("form", ["diffsynth", "peft", "a folder of one file"])
def test_loras_of_a_pair_are_evaluated_in_every_form(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    layout = form if form in ("diffsynth", "peft") else "diffusers"
    path = export(root / "run", layout=layout, output=tmp_path / "pair")
    if layout == "diffusers":
        path = one_file(path, tmp_path / "one" / "x.safetensors").parent
    assert evaluated(root, capsys, "--lora", str(path)) == pytest.approx(logged(root, 6), rel=1e-5)


def test_one_experts_lora_is_no_pairs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither the file nor a folder of it; with its own expert's recipe the losses are that expert's."""
    pair = export(root / "run", output=tmp_path / "pair")
    (tmp_path / "alone").mkdir()
    file = shutil.copy(pair / f"{STEM.format('high')}.safetensors", tmp_path / "alone")
    for path in (str(file), str(tmp_path / "alone")):
        assert evaluate.main([*arguments(root), "--lora", path]) == 2
        assert f"--lora {path} holds one expert: set model.expert to the one" in capsys.readouterr().err
    for weights in (("--lora", str(file)), ("--checkpoint", str(root / "run"))):
        assert evaluate.main([*arguments(root), "model.expert=high", *weights]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["eval_loss"] == pytest.approx(logged(root, 6)["eval_loss_high"], rel=1e-5)


def test_moving_averages_of_a_pair_are_exported(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    averages = read_trained(root / "run" / "checkpoint-6", ema=True)
    pair = export(root / "run", ema=True, output=tmp_path / "pair")
    for expert in ("high", "low"):
        layers = read_lora(pair / f"{STEM.format(expert).replace('-lora', '-ema-lora')}.safetensors", expert).layers
        for name, layer in layers.items():
            prefix = f"{expert}.{name}"
            assert torch.equal(layer.down, averages.pop(f"{prefix}.lora_A.default.weight"))
            assert torch.equal(layer.up, averages.pop(f"{prefix}.lora_B.default.weight"))  # alpha / r is 1
    assert not averages
    found = evaluated(root, capsys, "--checkpoint", str(root / "run"), "--ema")
    assert found == pytest.approx(evaluated(root, capsys, "--lora", str(pair)), rel=1e-5)
    assert found["eval_loss"] != pytest.approx(logged(root, 6)["eval_loss"], rel=1e-5)
