"""accelerate's plugins in a loop of the user's own: sharded like training's, and equal to one process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from synthetic import tiny_denoiser

from wan_accel.tiny import init_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    init_tiny("t2v-1.3b", folder)
    return str(folder)


def run_example(*arguments: str) -> list[float]:
    import importlib.util

    path = ROOT / "examples" / "accelerate_loop.py"
    spec = importlib.util.spec_from_file_location("accelerate_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> list[float]:
    return run_ranks(run_example, 1, "--checkpoint", checkpoint, engine="single")[0]


@pytest.mark.parametrize(
    ("engine", "launched", "processes", "ulysses"),
    [("fsdp2", "fsdp2", 2, 2), ("fsdp2", "ddp", 2, 1), ("fsdp2", "hsdp", 4, 2), ("zero3", "zero3", 2, 2), ("zero3", "zero3", 2, 1)],
)  # fmt: skip
def test_the_example_equals_one_process(
    engine: str, launched: str, processes: int, ulysses: int, checkpoint: str, alone: list[float]
) -> None:
    arguments = ["--checkpoint", checkpoint, "--engine", engine, "--ulysses", str(ulysses)]
    for losses in run_ranks(run_example, processes, *arguments, engine=launched):
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=0)
