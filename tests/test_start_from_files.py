"""Runs on a checkpoint from the hub's cache that go on from exports of one another: the loss goes on too."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from exports import write_ema
from tiny_clips import clip_row, write_clips

sys.path.insert(0, str(Path(__file__).parent / "preprocessing"))  # the hub is shared with the tests there

from local_hub import hub_of_this_process

from wan_accel import cache, evaluate, train
from wan_accel.checkpoint import read_trained
from wan_accel.cli import main
from wan_accel.export import export
from wan_accel.tiny import init_tiny

RECIPE = """
variant: t2v-1.3b
model: {{checkpoint: Tiny/Wan}}
method: {{kind: lora, r: 4, lora_alpha: 8}}
data: {{clips: {root}/clips, latents: {root}/latents, global_batch: {{samples: 2}}}}
objective: {{shift: 1.0}}
memory: {{activation_checkpointing: none}}
validation: {{every_steps: 3, sigmas: 2}}
training:
  output_dir: {root}/run
  learning_rate: 2e-2
  lr_scheduler_type: constant
  max_steps: 3
  logging_steps: 1
  save_steps: 3
  dataloader_num_workers: 0
  seed: 0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on a hub id, fetched, cached and trained."""
    folder = tmp_path_factory.mktemp("start")
    init_tiny("t2v-1.3b", folder / "released")
    write_clips(folder / "clips", [clip_row(number) for number in range(2)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=folder))
    files = {path.relative_to(folder / "released").as_posix(): path for path in (folder / "released").rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        with hub_of_this_process() as hub:
            hub.add("models", "Tiny/Wan", {name: path.read_bytes() for name, path in files.items() if path.is_file()})
            assert main(["download", str(recipe)]) == 0
        assert cache.main([str(recipe)]) == 0
        assert train.main([str(recipe)]) == 0
        yield folder


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("comfyui", ["method.init_from={path}"]),
        ("diffusers", ["method={{kind: full}}", "model.fuse_loras=[{{path: {path}}}]"]),
        ("original", ["method={{kind: full, init_from: {path}}}"]),
    ],
)
def test_a_run_goes_on_where_an_export_ended(root: Path, layout: str, changes: list[str]) -> None:
    trained = losses(root / "run")
    assert trained[3] < 0.99 * trained[0]
    path = export(root / "run", layout=layout, output=root / layout, merge=layout == "original")
    run = root / f"run-{layout}"
    arguments = [change.format(path=path) for change in changes]
    changed = ["training.max_steps=1", "training.learning_rate=1e-5", f"training.output_dir={run}"]
    assert train.main([str(root / "recipe.yaml"), *arguments, *changed]) == 0
    assert losses(run)[0] == pytest.approx(trained[3], rel=1e-5)


def test_a_start_that_does_not_fit_says_what_to_set(root: Path, capsys: pytest.CaptureFixture) -> None:
    path = export(root / "run", layout="peft", output=root / "peft")
    arguments = [str(root / "recipe.yaml"), f"method.init_from={path}", f"training.output_dir={root / 'run-refused'}"]
    assert train.main([*arguments, "method.r=8"]) == 2
    assert "set method.r=4 and method.lora_alpha=8" in capsys.readouterr().err
    assert train.main([*arguments, "method.target_modules=[ffn.0]"]) == 2
    message = capsys.readouterr().err
    assert "the LoRA does not fit method.target_modules" in message and "unknown blocks.0." in message
    assert not (root / "run-refused").exists()


def test_evaluation_takes_a_lora_of_any_layout(root: Path, capsys: pytest.CaptureFixture) -> None:
    path = export(root / "run", layout="peft", output=root / "peft-again")
    capsys.readouterr()
    assert evaluate.main([str(root / "recipe.yaml"), "--lora", str(path)]) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"]
    assert loss == pytest.approx(losses(root / "run")[3], rel=1e-5)


def test_evaluation_takes_moving_averages(root: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, run = str(root / "recipe.yaml"), root / "run"
    assert evaluate.main([recipe, "--checkpoint", str(run), "--ema"]) == 2
    assert "checkpoint-3 has no moving average: train with method.ema" in capsys.readouterr().err
    assert evaluate.main([recipe, "--ema"]) == 2
    assert "--ema is of a run's checkpoint: give --checkpoint too" in capsys.readouterr().err
    shutil.copytree(run / "checkpoint-3", root / "averaged" / "checkpoint-3")
    # Averages of adapters that do nothing: the losses are then those of the base.
    write_ema(
        root / "averaged" / "checkpoint-3",
        {name: tensor * (".lora_A." in name) for name, tensor in read_trained(run / "checkpoint-3").items()},
    )
    arguments = [recipe, "--checkpoint", str(root / "averaged"), "--ema"]
    assert evaluate.main(arguments) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"]
    assert loss == pytest.approx(losses(run)[0], rel=1e-5) != losses(run)[3]
