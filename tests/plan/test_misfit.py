"""`plan.on_misfit`: what a run does, before it reads weights, where it will not fit its GPU."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LAUNCH_ENV, run_ranks
from tiny_clips import clip_row, write_clips

from wan_accel import cache, train
from wan_accel.plan import misfit
from wan_accel.plan.layout import Layout
from wan_accel.recipe.load import RecipeError, load_recipe
from wan_accel.tiny import init_tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("misfit")
    init_tiny("t2v-1.3b", folder / "model")
    write_clips(folder / "clips", [clip_row(number, hw=(64, 32)) for number in range(2)])
    arguments = [
        "t2v-1.3b/lora", f"model.checkpoint={folder / 'model'}", f"data.clips={folder / 'clips'}",
        f"data.latents={folder / 'latents'}", "data.global_batch.samples=2", "data.eval.fraction=0",
        "parallel.ulysses=1", "validation.every_steps=0", "training.max_steps=1", "training.save_strategy=no",
        "training.dataloader_num_workers=0",
    ]  # fmt: skip
    assert cache.main(arguments) == 0
    return arguments


def give_memory(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """As a GPU of so many bytes would say; the run itself stays on the CPU."""
    monkeypatch.setattr(misfit, "gpu_memory", lambda device: memory)


def run(recipe: list[str], tmp_path: Path, *more: str) -> int:
    return train.main([*recipe, f"training.output_dir={tmp_path / 'run'}", "memory.compile=false", *more])


def test_an_error_comes_before_weights(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    give_memory(monkeypatch, 2**20)
    monkeypatch.setattr(train, "assemble_experts", lambda *_, **__: pytest.fail("weights were read"))
    assert run(recipe, tmp_path, "plan.on_misfit=error") == 2
    error = capsys.readouterr().err
    assert "plan.on_misfit: does not fit: peak 0.0 of 0.0 GiB (reserve 6%), by formula" in error
    assert "`wan-accel plan RECIPE --config_file CONFIG` names layouts that would" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("memory", "level", "word"), [(2**20, "WARNING", "does not fit"), (2**30, "INFO", "fits")])
def test_a_run_goes_on_with_a_warning(
    memory: int, level: str, word: str, recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By default; and the model computes with real tensors after the fake ones."""
    give_memory(monkeypatch, memory)
    caplog.set_level(logging.INFO, logger="wan_accel")
    assert run(recipe, tmp_path) == 0
    (record,) = [record for record in caplog.records if "the plan:" in record.getMessage()]
    assert record.levelname == level and f"the plan: {word}: peak" in record.getMessage()


def test_nothing_is_compared_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misfit, "from_main_rank", lambda make: pytest.fail("compared"))
    nothing: Any = None
    misfit.check_fit(nothing, "error", shapes=nothing, buckets=[], device=torch.device("cpu"))


def test_only_two_things_can_happen() -> None:
    with pytest.raises(RecipeError, match=r"plan\.on_misfit: Input should be 'warn' or 'error'"):
        load_recipe("t2v-1.3b/lora", ["plan.on_misfit=stop"])


def layout_of_rank(ulysses: int) -> Layout:
    return misfit.launched_layout(ulysses)


@pytest.mark.parametrize(
    "engine",
    ["ddp", "fsdp2", "fsdp2-bf16", "fsdp2-offload", "hsdp", "zero2", "zero2-bf16", "zero3", "zero3-offload"],
)
def test_the_launched_layout(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LAUNCH_ENV[engine], "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    expected = Layout(
        engine=engine.partition("-")[0],  # type: ignore[arg-type]
        world_size=4, ulysses=2, dp_replicate=2 if engine == "hsdp" else 1, is_mixed=engine.endswith("bf16"),
        offload="parameters" if engine.endswith("offload") else "none",
    )  # fmt: skip
    assert misfit.launched_layout(2) == expected
    if engine == "zero3":
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
        assert misfit.launched_layout(2).offload == "optimizer"


def refused(arguments: list[str]) -> str:
    """What each of two ranks is told, where only the main one has looked."""
    if os.environ["RANK"] == "1":
        misfit._compare = lambda *_: 1 / 0  # type: ignore[assignment]
    misfit.gpu_memory = lambda device: 2**20  # type: ignore[assignment]
    try:
        train.build_trainer(load_recipe(arguments[0], arguments[1:]), on_misfit="error")
    except ValueError as error:
        return str(error)
    return "built"


def test_all_ranks_stop(recipe: list[str], tmp_path: Path) -> None:
    arguments = [*recipe, f"training.output_dir={tmp_path / 'run'}", "memory.compile=false"]
    first, second = run_ranks(refused, 2, arguments, engine="fsdp2")
    assert first == second and first.startswith("plan.on_misfit: does not fit")
    assert "fsdp2, 2 GPUs" in first
