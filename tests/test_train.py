"""Train, evaluate and export a recipe as a user launches them; and what bad input gets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_clips import clip_row, write_clips

from wan_accel import cache, checkpoint, evaluate, export, train
from wan_accel.models.loading import CheckpointReader, load_wan
from wan_accel.tiny import init_tiny

RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate"
RECIPE = """
variant: animate-14b
model: {{checkpoint: {root}/model}}
method: {{kind: lora, r: 4, lora_alpha: 8}}
data: {{clips: {root}/clips, latents: {root}/latents, global_batch: {{samples: 4}}}}
cache: {{known_variants: 2}}
objective: {{shift: 1.0}}
memory: {{activation_checkpointing: none}}
validation: {{every_steps: 3, sigmas: 2}}
training:
  output_dir: {root}/run
  learning_rate: 1e-2
  lr_scheduler_type: constant
  max_steps: 6
  logging_steps: 1
  save_steps: 3
  dataloader_num_workers: 0
  seed: 0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, four clips and their cached conditions."""
    folder = tmp_path_factory.mktemp("job")
    init_tiny("animate-14b", folder / "model")
    write_clips(folder / "clips", [clip_row(number) for number in range(4)])
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    assert cache.main([str(folder / "recipe.yaml")]) == 0
    return folder


def launch(config: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    """`accelerate launch` with a shipped CPU config."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(RECIPES / config),
        "--num_processes", str(processes), "-m", *arguments,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def metrics(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_losses_of_one_process(root: Path, run: Path, *changes: str) -> None:
    """The losses that a launched run has logged are those of the same recipe in this process."""
    alone = root / f"{run.name}-alone"
    assert train.main([str(root / "recipe.yaml"), *changes, f"training.output_dir={alone}"]) == 0
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(alone, key), rel=1e-5)


@pytest.mark.launch
def test_launched_fsdp2_ulysses_lora_is_exported_and_reloaded(root: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, run = str(root / "recipe.yaml"), root / "run"
    done = launch("cpu_fsdp2.yaml", "wan_accel.train", recipe, "parallel.ulysses=2")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = metrics(run, "eval_loss")
    assert losses[6] < losses[0]
    assert_losses_of_one_process(root, run)
    assert json.loads((run / "run_state.json").read_text()) == {"state": "finished", "step": 6}
    assert json.loads((run / "run.json").read_text())["engine"] == "fsdp2"
    assert (run / "loss.png").stat().st_size > 5000
    assert checkpoint.last_checkpoint(run) == run / "checkpoint-6"

    written = export.export(run, output=root / "lora.safetensors")
    trained, exported = checkpoint.read_trained(run / "checkpoint-6"), load_file(written)
    name = next(name for name in exported if ".lora_B." in name)
    torch.testing.assert_close(exported[name], trained[name] * 2)  # alpha / r
    with pytest.raises(ValueError, match=r"lora\.safetensors exists"):
        export.export(run, output=written)
    with pytest.raises(ValueError, match="layout 'original' does not fit a lora checkpoint"):
        export.export(run, layout="original", output=root / "x")

    capsys.readouterr()
    assert evaluate.main([recipe, "--lora", str(written)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"] == pytest.approx(losses[6], rel=1e-5)


@pytest.mark.launch
def test_launched_zero3_full_is_exported_and_reloaded(root: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, run, out = str(root / "recipe.yaml"), root / "run-zero3", root / "full"
    changes = ["method={kind: full}", "training.learning_rate=1e-3"]
    done = launch("cpu_zero3.yaml", "wan_accel.train", recipe, *changes, f"training.output_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = metrics(run, "eval_loss")
    assert losses[6] < 0.97 * losses[0]
    assert_losses_of_one_process(root, run, *changes)
    assert export.export(run, output=out) == out
    base, written = CheckpointReader(root / "model"), CheckpointReader(out)
    assert written.shapes == base.shapes  # the motion encoder, which was not trained, came along
    motion = next(name for name in base.shapes if name.startswith("motion_encoder.") and name.endswith("weight"))
    assert torch.equal(base.read(motion), written.read(motion))
    capsys.readouterr()
    assert evaluate.main([recipe, f"model.checkpoint={out}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"] == pytest.approx(losses[6], rel=1e-5)


def test_lora_leaves_the_base_alone_and_resumes(root: Path, capsys: pytest.CaptureFixture) -> None:
    run = root / "run-resumed"
    arguments = [str(root / "recipe.yaml"), f"training.output_dir={run}"]
    assert train.main([*arguments, "training.max_steps=3"]) == 0
    assert train.main(arguments) == 0  # resume_from_checkpoint: auto is the default
    assert sorted(metrics(run, "loss")) == [1, 2, 3, 4, 5, 6]
    message = fails([*arguments, f"training.resume_from_checkpoint={run / 'checkpoint-3'}"], capsys)
    assert "holds checkpoint-6, newer than" in message
    trainer = train.build_trainer(train.load_recipe(arguments[0], [arguments[1]]))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    fresh = dict(load_wan("animate-14b", root / "model").named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, fresh[name.replace(".base_layer.", ".")]), name


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run wan_accel.train where it must refuse; returns the one message."""
    capsys.readouterr()
    assert train.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_bad_input(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = str(root / "recipe.yaml")
    output = f"training.output_dir={tmp_path / 'run'}"
    broken = tmp_path / "broken"
    shutil.copytree(root / "model", broken)
    part = next(broken.glob("*-00002-of-*.safetensors"))
    part.write_bytes(part.read_bytes()[:1000])
    assert "is damaged or cut short" in fails([recipe, output, f"model.checkpoint={broken}"], capsys)
    part.unlink()
    assert f"lacks {part.name}" in fails([recipe, output, f"model.checkpoint={broken}"], capsys)
    assert "is not a folder" in fails([recipe, output, f"model.checkpoint={tmp_path / 'none'}"], capsys)
    other = tmp_path / "other"
    init_tiny("animate-14b", other, seed=1)
    message = fails([recipe, output, f"model.checkpoint={other}"], capsys)
    assert "video" in message and "encoded with other weights or settings" in message
    assert "match no linear layer" in fails([recipe, output, "method.target_modules=[nothing]"], capsys)
    assert "is not a dataset" in fails([recipe, output, f"data.latents={tmp_path}"], capsys)
    assert "does not divide the 1 processes" in fails([recipe, output, "parallel.ulysses=2"], capsys)
    assert "did you mean max_steps" in fails([recipe, output, "training.max_step=3"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_with_one_message(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    arguments = [str(root / "recipe.yaml"), f"training.output_dir={run}", "training.learning_rate=1e30"]
    assert train.main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss is not finite for square")
    assert "there is no checkpoint yet" in message and "objective.on_nan: skip" in message
    saved = torch.load(run / "nan-step-2-rank-0.pt", weights_only=True)
    assert all(clip in message for micro in saved["clips"] for clip in micro)
    assert "NonFiniteError: step 2" in (run / "logs" / "rank-0.log").read_text()
    assert json.loads((run / "run_state.json").read_text())["state"] == "failed"


def test_output_of_another_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(root / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}", "training.max_steps=3"]
    assert train.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    message = fails([*arguments, "training.resume_from_checkpoint=never", "training.learning_rate=9"], capsys)
    assert "holds checkpoints of another run" in message
    assert evaluate.main([*arguments, "training.learning_rate=9"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    assert sorted(checkpoint.complete_checkpoints(tmp_path / "run")) == [tmp_path / "run" / "checkpoint-3"]


def test_full_disk(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up between two checkpoints, then before the start."""
    run = tmp_path / "run"
    arguments = [str(root / "recipe.yaml"), f"training.output_dir={run}", "training.save_steps=2"]
    usage = shutil.disk_usage(tmp_path)

    def filling(path: Path) -> object:
        return usage._replace(free=1000 if (run / "checkpoint-2").exists() else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    assert train.main(arguments) == 2  # behind the progress bar
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: training.output_dir={run}: a checkpoint needs")
    assert checkpoint.complete_checkpoints(run) == [run / "checkpoint-2"]
    state = json.loads((run / "run_state.json").read_text())
    assert (state["state"], state["step"]) == ("failed", 4)
    assert "GiB are free. Free some" in fails(arguments, capsys)
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert checkpoint.last_checkpoint(run) == run / "checkpoint-6"


@pytest.mark.launch
def test_world_size_that_does_not_fit(root: Path) -> None:
    done = launch("cpu_fsdp2.yaml", "wan_accel.train", str(root / "recipe.yaml"), "parallel.ulysses=3")
    assert done.returncode != 0
    assert "parallel.ulysses=3 does not divide the 2 processes" in done.stderr
    assert not (root / "run-none").exists()


def test_print_config(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert train.main([str(root / "recipe.yaml"), "--print-config", "training.max_steps=11"]) == 0
    assert "max_steps: 11" in capsys.readouterr().out
    assert train.main([str(root / "recipe.yaml"), "--training.max_steps", "12", "--print-config"]) == 0
    assert "max_steps: 12" in capsys.readouterr().out
