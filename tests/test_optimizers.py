"""Every optimizer that `training.optim` may name, on every engine that it may be used with; the others are refused."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, logged, small_trainer

from wan_accel import checkpoint
from wan_accel.optimizers import optimizer_problem, usable_optimizers
from wan_accel.recipe.check import check
from wan_accel.recipe.load import load_recipe

ENGINES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
Weights = dict[str, torch.Tensor]
ARGUMENTS = {"sgd": {"learning_rate": 1.0, "max_grad_norm": 0.1, "optim_args": "momentum=0.9"}}
# Relative to the update of a run on one process. 8-bit moments are rounded in blocks of 256 elements of a shard.
TOLERANCE = {"adamw_torch_8bit": 3e-2}


def train_all(base: str, output_dir: str, engine: str, optims: list[str]) -> dict[str, tuple[Weights, Weights, list]]:
    """Weights after 3 steps, the same when resumed at step 2, and losses, of each optimizer."""
    torch.compiler.set_stance("force_eager")  # torchao compiles its update once a shape, which takes minutes here
    gc.freeze()  # accelerate collects garbage before every run
    results = {}
    for optim in optims:
        runs = []
        for resume in (None, f"{output_dir}/{optim}/checkpoint-2"):
            folder = f"{output_dir}/{optim}{'-resumed' if resume else ''}"
            trainer = small_trainer(base, folder, engine, optim=optim, **ARGUMENTS.get(optim, {}), max_steps=3)
            trainer.train(resume_from_checkpoint=resume)
            runs.append(full_weights(trainer))
        results[optim] = (*runs, logged(trainer, "loss"))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, tuple[Weights, Weights, list]]]:
    base = str(write_checkpoint(folder / "base", "t2v-1.3b"))
    return {
        engine: run_ranks(
            train_all, processes, base, str(folder / engine), engine, usable_optimizers(engine), engine=engine
        )[0]
        for engine, processes in ENGINES.items()
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_equals_uninterrupted(runs: dict, engine: str) -> None:
    for optim, (whole, resumed, _) in runs[engine].items():
        for name in whole:
            assert torch.equal(whole[name], resumed[name]), f"{optim} {name}"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_equals_one_process(runs: dict, engine: str) -> None:
    from synthetic import tiny_denoiser

    start = tiny_denoiser("t2v-1.3b").state_dict()
    for optim, (found, _, losses) in runs[engine].items():
        expected, _, expected_losses = runs["single"][optim]
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for name in found:
            update = (expected[name] - start[name]).norm().item()
            assert update > 0, f"{optim} does not move {name}"
            error = (found[name] - expected[name]).norm().item()
            assert error <= TOLERANCE.get(optim, 2e-4) * update, f"{optim} {name}: {error / update}"


def go_on(base: str, output_dir: str, resume: str) -> Weights:
    torch.compiler.set_stance("force_eager")
    trainer = small_trainer(base, output_dir, "single", optim="adamw_torch_8bit", max_steps=3)
    trainer.train(resume_from_checkpoint=resume)
    return full_weights(trainer)


def test_8bit_moments_go_to_another_number_of_ranks(runs: dict, folder: Path) -> None:
    resume = str(folder / "fsdp2" / "adamw_torch_8bit" / "checkpoint-2")
    found = run_ranks(go_on, 1, str(folder / "base"), str(folder / "on"), resume, engine="single")[0]
    whole, _, _ = runs["fsdp2"]["adamw_torch_8bit"]
    start = checkpoint.read_trained(Path(resume))
    for name, weight in found.items():
        update = (whole[name] - start[name]).norm().item()
        assert (weight - whole[name]).norm().item() <= TOLERANCE["adamw_torch_8bit"] * update, name


def test_which_are_usable() -> None:
    everywhere = ["adamw_torch", "adamw_torch_fused", "sgd"]
    assert usable_optimizers() == usable_optimizers("single") == [*everywhere, "adafactor", "adamw_torch_8bit"]
    assert usable_optimizers("hsdp") == usable_optimizers("fsdp2") == [*everywhere, "adamw_torch_8bit"]
    assert usable_optimizers("zero3") == everywhere
    assert optimizer_problem("lion_8bit") == (
        "training.optim=lion_8bit cannot be used: it is not tested here; use adamw_torch, adamw_torch_fused, sgd, "
        "adafactor, adamw_torch_8bit"
    )


def test_a_checkpoint_needs_the_disk_that_its_optimizer_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"a": [1024, 512], "b": [8]}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8 * 1024 * 512))
    checkpoint.check_space(tmp_path, trained, optim="adamw_torch_8bit")  # 4 and 2.03 bytes an element
    for optim, has_ema in (("adamw_torch", False), ("adamw_torch_8bit", True)):
        with pytest.raises(checkpoint.NoSpaceError, match="a checkpoint needs"):
            checkpoint.check_space(tmp_path, trained, optim=optim, has_ema=has_ema)


def test_check_refuses_the_others() -> None:
    recipe = load_recipe("animate-14b/lora", ["training.optim=adafactor"])
    assert check(recipe, engine="ddp") == []
    (problem,) = check(recipe, engine="hsdp")
    assert problem == (
        "training.optim=adafactor cannot be used with hsdp: it cannot work on sharded parameters; use adamw_torch, "
        "adamw_torch_fused, sgd, adamw_torch_8bit"
    )
    recipe = load_recipe("animate-14b/lora", ["training.optim=adafactor", "memory.compile=false"])
    (problem,) = check(recipe, engine="zero3")
    assert problem.endswith("use adamw_torch, adamw_torch_fused, sgd")
    (problem,) = check(load_recipe("animate-14b/lora", ["training.optim=galore_adamw"]))
    assert "galore_adamw cannot be used: it is not tested here" in problem


def refused(base: str, output_dir: str) -> str:
    with pytest.raises(ValueError) as error:
        small_trainer(base, output_dir, "single", optim="adagrad")
    return str(error.value)


def test_the_trainer_refuses_them_too(tmp_path: Path) -> None:
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    assert "training.optim=adagrad cannot be used with single" in run_ranks(
        refused, 1, base, str(tmp_path / "run"), engine="single"
    )[0]
