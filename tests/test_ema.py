"""The moving average: against one computed by hand, on every engine; resumed on another number of ranks; swapped in."""

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, logged, small_trainer
from synthetic import SyntheticSource
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from wan_accel import checkpoint
from wan_accel.ema import Ema, EmaSettings
from wan_accel.export import export
from wan_accel.held_out import fixed_draws
from wan_accel.lora_files import read_lora
from wan_accel.models.reader import CheckpointReader
from wan_accel.recipe.arguments import training_arguments
from wan_accel.recipe.check import check
from wan_accel.recipe.load import load_recipe

Weights = dict[str, torch.Tensor]
LAYOUTS = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
EMA = {"ema_decay": 0.25, "learning_rate": 1e-2, "max_steps": 4}


class Recorder(TrainerCallback):
    """Whole weights before the first step and after each."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: list[Weights] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(full_weights(self.trainer))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(full_weights(self.trainer))


def train(
    base: str, output_dir: str, engine: str, method: str, resume: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[list[Weights], dict[str, float], Weights]:  # fmt: skip
    """Weights over the run, losses of validation with and without the average, and the weights that it put in."""
    recorder = Recorder()
    arguments = {**EMA, **(options or {})}
    trainer = small_trainer(base, output_dir, engine, method=method, callbacks=[recorder], **arguments)
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    before = forward_weights(trainer)
    draws = fixed_draws(SyntheticSource("t2v-1.3b").index(), [0, 1], num_sigmas=2, seed=0)
    losses = {"plain": mean_loss(trainer, draws)}
    with trainer.ema.swapped():
        losses["ema"] = mean_loss(trainer, draws)
        swapped = forward_weights(trainer)
    losses["again"] = mean_loss(trainer, draws)
    after = forward_weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return recorder.weights, losses, swapped


def mean_loss(trainer: Any, draws: Any) -> float:
    from wan_accel.validation import as_metrics, fixed_losses

    return as_metrics(fixed_losses(trainer, draws))["eval_loss"]


def forward_weights(trainer: Any) -> Weights:
    """What a forward pass reads; under ZeRO a copy of the optimizer's masters. Collective."""
    if not trainer.engine.startswith("zero"):
        return full_weights(trainer)
    import deepspeed

    weights = {}
    for name, parameter in trainer.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.data.clone()
    return weights


def by_hand(weights: list[Weights], decay: float, update_every: int = 1) -> Weights:
    """min(decay, (1 + n) / (10 + n)), n updates before this one."""
    average = {name: value.double() for name, value in weights[0].items()}
    for number, after in enumerate(weights[1:][update_every - 1 :: update_every]):
        d = min(decay, (1 + number) / (10 + number))
        average = {name: d * average[name] + (1 - d) * after[name].double() for name in average}
    return average


def assert_average(folder: Path, expected: Weights) -> None:
    found = checkpoint.read_trained(folder, ema=True)
    assert found.keys() == expected.keys() == checkpoint.read_trained(folder).keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


@pytest.mark.parametrize(("layout", "method"), [(name, "full") for name in LAYOUTS] + [("fsdp2", "lora")])
def test_equals_one_by_hand_resumes_and_is_swapped_in(layout: str, method: str, base: str, tmp_path: Path) -> None:
    arguments = [layout, method]
    processes = LAYOUTS[layout]
    weights, losses, swapped = run_ranks(train, processes, base, str(tmp_path / "a"), *arguments, engine=layout)[0]
    assert_average(tmp_path / "a" / "checkpoint-4", by_hand(weights, 0.25))
    assert losses["plain"] == losses["again"] != losses["ema"]
    resume = str(tmp_path / "a" / "checkpoint-2")
    _, again, _ = run_ranks(train, processes, base, str(tmp_path / "b"), *arguments, resume, engine=layout)[0]
    assert again == losses
    first = checkpoint.read_trained(tmp_path / "a" / "checkpoint-4", ema=True)
    second = checkpoint.read_trained(tmp_path / "b" / "checkpoint-4", ema=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], swapped[name]) for name in first)
    assert_exported(tmp_path / "a", swapped, method)


def assert_exported(run: Path, averages: Weights, method: str) -> None:
    """`export --ema` writes the averages that the run held, whatever its engine."""
    if method == "full":
        reader = CheckpointReader(export(run, ema=True, output=run / "averages"))
        exported = {name: reader.read(name) for name in reader.shapes}
    else:
        exported = {}
        for name, layer in read_lora(export(run, ema=True, output=run / "averages.safetensors")).layers.items():
            exported[f"{name}.lora_A.default.weight"] = layer.down
            exported[f"{name}.lora_B.default.weight"] = layer.up / 2  # alpha / r is folded in
    assert exported.keys() == averages.keys()
    for name, value in exported.items():
        assert torch.equal(value, averages[name]), name


def test_resumes_on_another_number_of_ranks_and_in_host_memory(base: str, tmp_path: Path) -> None:
    """Every second step is averaged, so the run stops between two updates and goes on from the count."""
    options = {"ema_update_every": 2, "ema_device": "cpu", "save_steps": 3, "max_steps": 6}
    expected, _, _ = run_ranks(
        train, 1, base, str(tmp_path / "one"), "single", "full", None, options, engine="single"
    )[0]
    run_ranks(train, 2, base, str(tmp_path / "two"), "fsdp2", "full", None, options, engine="fsdp2")
    resume = str(tmp_path / "two" / "checkpoint-3")
    run_ranks(train, 1, base, str(tmp_path / "again"), "single", "full", resume, options, engine="single")
    average = by_hand(expected, 0.25, 2)
    found = checkpoint.read_trained(tmp_path / "again" / "checkpoint-6", ema=True)
    start = expected[0]
    for name, value in found.items():
        error, moved = (value - average[name]).norm().item(), (average[name] - start[name]).norm().item()
        assert error < 1e-3 * moved, name


def test_only_what_was_stepped_is_averaged() -> None:
    """The experts of a pair: names that a step does not give keep their average and their count."""
    pair = torch.nn.ModuleDict({"high": torch.nn.Linear(2, 2), "low": torch.nn.Linear(2, 2)})
    ema = Ema(pair, EmaSettings(decay=0.5))
    start = {name: average.clone() for name, average in ema.shadow.items()}
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter += 1
    ema.update([name for name in ema.shadow if name.startswith("high.")])
    for name, average in ema.shadow.items():
        expected = start[name] + (0.9 if name.startswith("high.") else 0.0)
        torch.testing.assert_close(average, expected)
    assert ema.steps == {"high.weight": 1, "high.bias": 1, "low.weight": 0, "low.bias": 0}
    assert [EmaSettings(decay=0.9999).decay_after(n) for n in (0, 90, 10**6)] == [0.1, 0.91, 0.9999]


def test_weights_that_lie_elsewhere_are_copied_one_by_one() -> None:
    """Host memory holds one weight beside the averages; here fp64 stands for another device."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)]).double()
    ema = Ema(model, EmaSettings(decay=0.5))
    start = {name: average.clone() for name, average in ema.shadow.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with _Copies() as copies:
        ema.update()
    assert copies.most == 1
    for name, average in ema.shadow.items():
        torch.testing.assert_close(average, start[name] + 0.9)  # d is 0.1 at first


class _Copies(TorchDispatchMode):
    """Counts copies that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function):
            self.alive.add(result)
            self.most = max(self.most, len(self.alive))
        return result


def offload(base: str, output_dir: str) -> None:
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    with pytest.raises(ValueError, match=r"method.ema cannot be used with ZeRO-3's offloading yet: set"):
        small_trainer(base, output_dir, "zero3", ema_decay=0.9)


def test_offload_is_refused(base: str, tmp_path: Path) -> None:
    run_ranks(offload, 1, base, str(tmp_path), engine="zero3")
    recipe = load_recipe("animate-14b/lora", ["method.ema={decay: 0.99}", "memory.compile=false"])
    assert check(recipe, engine="zero3") == check(recipe, engine="zero2", offload="optimizer") == []
    (problem,) = check(recipe, engine="zero3", offload="optimizer")
    assert problem.startswith("method.ema cannot be used with ZeRO-3's offloading yet")


def resume_without(base: str, output_dir: str) -> str:
    trainer = small_trainer(base, output_dir, "single", max_steps=2)
    trainer.train()
    asking = small_trainer(base, output_dir, "single", ema_decay=0.9)
    with pytest.raises(ValueError) as error:
        asking.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2")
    return str(error.value)


def test_what_is_refused(base: str, tmp_path: Path) -> None:
    message = run_ranks(resume_without, 1, base, str(tmp_path / "run"), engine="single")[0]
    assert "has no moving average but the recipe asks for one: remove method.ema" in message
    with pytest.raises(ValueError, match=r"has no moving average: train with method.ema"):
        checkpoint.read_trained(tmp_path / "run" / "checkpoint-2", ema=True)
    (problem,) = check(load_recipe("animate-14b/lora", ["validation.ema=true"]))
    assert problem == "validation.ema=true without a moving average: set method.ema, e.g. {decay: 0.9999}"
    recipe = load_recipe("animate-14b/lora", ["validation.ema=true", "method.ema={decay: 0.99, update_every: 5}"])
    assert check(recipe) == []
    arguments = training_arguments(recipe)
    assert [arguments[name] for name in ("ema_decay", "ema_update_every", "ema_device", "eval_ema")] == [
        0.99, 5, "accelerator", True,
    ]  # fmt: skip


def evaluate(base: str, output_dir: str) -> tuple[float, float, list[float]]:
    trainer = small_trainer(base, output_dir, "single", eval_ema=True, **EMA)
    trainer.train()
    trainer.eval_draws = fixed_draws(SyntheticSource("t2v-1.3b").index(), [0, 1], num_sigmas=2, seed=0)
    trainer.args.eval_ema = False  # so that only the swap below is at work
    with trainer.ema.swapped():
        expected = mean_loss(trainer, trainer.eval_draws)
    trainer.args.eval_ema = True
    return expected, trainer.evaluate()["eval_loss"], logged(trainer, "eval_loss")


def test_validation_looks_at_the_average(base: str, tmp_path: Path) -> None:
    expected, found, lines = run_ranks(evaluate, 1, base, str(tmp_path), engine="single")[0]
    assert lines == [found] == [expected]
