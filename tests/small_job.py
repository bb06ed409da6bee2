"""A recipe with its tiny checkpoint, clips and cached conditions, and how a user launches it."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny_clips import clip_row, write_clips

from wan_accel import cache
from wan_accel.tiny import init_tiny

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
# Nothing is saved and nothing ends by itself, unless an override says so.
RECIPE = """
variant: t2v-1.3b
model: {{checkpoint: {root}/model}}
method: {{kind: lora, r: 4, lora_alpha: 8}}
data: {{clips: {root}/clips, latents: {root}/latents, global_batch: {{samples: 4}}, eval: {{fraction: 0}}}}
memory: {{activation_checkpointing: none}}
validation: {{every_steps: 0}}
training: {{output_dir: {root}/run, max_steps: 100000, logging_steps: 1, save_steps: 100000, dataloader_num_workers: 0}}
"""


def write_job(folder: Path) -> Path:
    """Everything that training needs; returns the recipe."""
    init_tiny("t2v-1.3b", folder / "model")
    write_clips(folder / "clips", [clip_row(number) for number in range(4)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=folder))
    assert cache.main([str(recipe)]) == 0
    return recipe


def launch_command(recipe: Path, *options: str, processes: int = 2) -> list[str]:
    """`accelerate launch` of a recipe on FSDP2; options of the launcher before, overrides may be appended."""
    return [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        str(CONFIGS / "cpu_fsdp2.yaml"), "--num_processes", str(processes), *options, "-m", "wan_accel.train",
        str(recipe),
    ]  # fmt: skip


def launch_env(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def log_lines(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    # The last line may be being written.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


def run_state(run: Path) -> dict[str, object]:
    return json.loads((run / "run_state.json").read_text())


def wait_for_step(run: Path, step: int, *, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Until a run has logged a step."""
    deadline = time.monotonic() + 240
    while not any(line["step"] >= step for line in log_lines(run)):
        assert is_alive() and time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.02)
