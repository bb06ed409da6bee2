"""Recipes as a user launches them: the losses of a layout are those of one process (tests/test_train.py has more)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from small_job import CONFIGS, launch_env, log_lines
from tiny_clips import clip_row, write_clips

from wan_accel import cache, train
from wan_accel.tiny import init_tiny

RECIPE = """
variant: ti2v-5b
model: {{checkpoint: {root}/model}}
method: {{kind: lora, r: 4, lora_alpha: 8}}
data: {{clips: {root}/clips, latents: {root}/latents, global_batch: {{samples: 4}}, eval: {{fraction: 0}}}}
memory: {{activation_checkpointing: attention}}
validation: {{every_steps: 0}}
training:
  output_dir: {root}/run
  learning_rate: 1e-3
  lr_scheduler_type: constant
  max_steps: 4
  logging_steps: 1
  save_strategy: "no"
  dataloader_num_workers: 0
"""


class Launch(NamedTuple):
    """The engine that comes up, the config of `accelerate launch`, processes, Ulysses degree, and what is trained."""

    engine: str
    config: str
    processes: int
    ulysses: int
    method: str


LAUNCHES = {
    "ddp, ulysses": Launch("ddp", "cpu_ddp.yaml", 2, 2, "full"),
    "fsdp2": Launch("fsdp2", "cpu_fsdp2.yaml", 2, 1, "full"),
    "zero3, ulysses": Launch("zero3", "cpu_zero3.yaml", 2, 2, "lora"),
    "hsdp, ulysses": Launch("fsdp2", "cpu_hsdp.yaml", 4, 2, "lora"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, clips of two lengths and their conditions, and HSDP for CPU processes."""
    folder = tmp_path_factory.mktemp("job")
    init_tiny("ti2v-5b", folder / "model")
    rows = [clip_row(number, num_frames=5 if number < 4 else 9, hw=(64, 96)) for number in range(6)]
    write_clips(folder / "clips", rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    assert cache.main([str(folder / "recipe.yaml")]) == 0
    config = yaml.safe_load((CONFIGS / "cpu_fsdp2.yaml").read_text())
    config["parallelism_config"] = {
        "parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2,
    }  # fmt: skip
    (folder / "cpu_hsdp.yaml").write_text(yaml.safe_dump(config))
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_lines(run) if "loss" in line]


@pytest.fixture(scope="module")
def one_process(root: Path) -> dict[str, list[float]]:
    """The losses of one process, by method."""
    for method in ("full", "lora"):
        assert train.main([str(root / "recipe.yaml"), *overrides(root, "one", method)]) == 0
    return {method: losses(root / f"one-{method}") for method in ("full", "lora")}


def overrides(root: Path, name: str, method: str) -> list[str]:
    kind = ["method={kind: full}"] if method == "full" else []
    return [*kind, f"training.output_dir={root / f'{name}-{method}'}"]


@pytest.mark.launch
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_has_the_losses_of_one_process(name: str, root: Path, one_process: dict[str, list[float]]) -> None:
    engine, config, processes, ulysses, method = LAUNCHES[name]
    file = root / config if (root / config).is_file() else CONFIGS / config
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file),
        "--num_processes", str(processes), "-m", "wan_accel.train", str(root / "recipe.yaml"),
        f"parallel.ulysses={ulysses}", *overrides(root, config, method),
    ]  # fmt: skip
    done = subprocess.run(command, env=launch_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = root / f"{config}-{method}"
    about = json.loads((run / "run.json").read_text())
    assert (about["engine"], about["world_size"]) == (engine, processes)
    found = losses(run)
    assert len(found) == 4
    assert found == pytest.approx(one_process[method], rel=1e-5)
