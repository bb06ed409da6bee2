"""Full training keeps fp32 masters: small updates arrive, which pure bf16 weights round away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_state, write_checkpoint
from ranks import run_ranks
from safetensors.torch import save_file
from small_run import full_weights, small_trainer

LEARNING_RATE = 1e-5
SIZE = 0.02
NUM_STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every weight is +-0.02, where neighbouring bf16 numbers are 1.2e-4 apart."""
    folder = write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b", num_files=1)
    state = {name: weight.sign() * SIZE for name, weight in tiny_state("t2v-1.3b").items()}
    file = next(folder.glob("*.safetensors"))
    save_file(state, file)
    return str(folder)


def moved(base: str, output_dir: str, engine: str, torch_dtype: torch.dtype) -> dict[str, Any]:
    """Share of the matrices' elements that a few steps of AdamW have changed, and the mean change."""
    trainer = small_trainer(
        base, output_dir, engine, torch_dtype=torch_dtype, learning_rate=LEARNING_RATE, max_steps=NUM_STEPS,
        save_strategy="no", weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    start = torch.tensor(SIZE, dtype=torch_dtype).float()
    changes = [(w.float().abs() - start).abs().flatten() for w in full_weights(trainer).values() if w.ndim > 1]
    change = torch.cat(changes)
    return {"share": (change > 0).float().mean().item(), "mean": change.mean().item()}


def test_masters_move_under_bf16_compute(base: str, tmp_path: Path) -> None:
    result = run_ranks(moved, 2, base, str(tmp_path), "fsdp2-bf16", torch.float32, engine="fsdp2-bf16")[0]
    assert result["share"] > 0.95
    assert 0.3 * NUM_STEPS * LEARNING_RATE < result["mean"] <= 1.01 * NUM_STEPS * LEARNING_RATE


def test_pure_bf16_does_not_move(base: str, tmp_path: Path) -> None:
    result = run_ranks(moved, 1, base, str(tmp_path), "single", torch.bfloat16, engine="single")[0]
    assert result == {"share": 0.0, "mean": 0.0}
