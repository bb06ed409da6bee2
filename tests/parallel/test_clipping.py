"""Clipping is the same on every layout: the norm over all shards, and the weights after a clipped step."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, logged, small_trainer

# An SGD step is proportional to the gradient, so that a wrong factor shows, which AdamW would hide.
ARGUMENTS = {"optim": "sgd", "max_grad_norm": 1e-2, "learning_rate": 1.0, "max_steps": 2, "save_strategy": "no"}
LAYOUTS = {
    # name: (engine, processes, ulysses)
    "ddp": ("ddp", 2, 1),
    "fsdp2": ("fsdp2", 2, 1),
    "zero2": ("zero2", 2, 1),
    "zero3": ("zero3", 2, 1),
    "ddp-ulysses": ("ddp", 2, 2),
    "fsdp2-ulysses": ("fsdp2", 2, 2),
    "zero2-ulysses": ("zero2", 2, 2),
    "zero3-ulysses": ("zero3", 2, 2),
    "hsdp-ulysses": ("hsdp", 4, 2),
}
METHODS = ("full", "lora")
Result = tuple[list[float], dict[str, torch.Tensor]]


def clipped(base: str, output_dir: str, engine: str, ulysses: int) -> dict[str, Result]:
    """Norms before clipping, and weights after two clipped steps, full and LoRA."""
    results = {}
    for method in METHODS:
        trainer = small_trainer(base, f"{output_dir}/{method}", engine, method=method, ulysses=ulysses, **ARGUMENTS)
        trainer.train()
        results[method] = logged(trainer, "grad_norm"), full_weights(trainer)
    return results


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_ranks(clipped, 1, base, str(tmp_path_factory.mktemp("alone")), "single", 1, engine="single")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_clipped_step_are_those_of_one_process(
    layout: str, base: str, alone: dict[str, Result], tmp_path: Path
) -> None:
    engine, processes, ulysses = LAYOUTS[layout]
    results = run_ranks(clipped, processes, base, str(tmp_path), engine, ulysses, engine=engine)
    for method in METHODS:
        expected_norms, expected = alone[method]
        assert min(expected_norms) > 10 * ARGUMENTS["max_grad_norm"]  # type: ignore[operator]
        for norms, weights in (result[method] for result in results):
            assert norms == pytest.approx(expected_norms, rel=1e-6)
            for name, weight in weights.items():
                torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7, msg=f"{method} {name}")


def test_one_process_moves_by_the_bound(base: str, tmp_path: Path) -> None:
    """One step of learning rate 1 moves all weights together by max_grad_norm."""
    before, after = run_ranks(one_step, 1, base, str(tmp_path), engine="single")[0]
    moved = torch.stack([(after[name].double() - before[name].double()).norm() for name in before]).norm()
    assert moved.item() == pytest.approx(1e-2, rel=1e-3)


def one_step(base: str, output_dir: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    trainer = small_trainer(base, output_dir, "single", **{**ARGUMENTS, "max_steps": 1})
    before = full_weights(trainer)
    trainer.train()
    return before, full_weights(trainer)
