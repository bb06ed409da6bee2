"""A loss or gradient that is not finite: the run stops with the samples named and saved, or the step is skipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, logged, small_trainer
from synthetic import SyntheticSource, plan_for, tiny_denoiser
from transformers import TrainerCallback

from wan_accel import checkpoint
from wan_accel.arguments import WanTrainingArguments
from wan_accel.checkpoint_writer import CheckpointWriter
from wan_accel.draws import SampleDraw
from wan_accel.models.pair import ExpertPair
from wan_accel.models.variants import VARIANTS
from wan_accel.nonfinite import FiniteGuard, NonFiniteError
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.recipe.arguments import training_arguments
from wan_accel.recipe.check import check
from wan_accel.recipe.load import load_recipe

ROW = 4
# A schedule that rises with every step and does not depend on the length of the run.
SCHEDULE = {"max_grad_norm": 0.5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}
LAYOUTS = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}


class BadSource(SyntheticSource):
    """One row with `value` in its latents, in the first epoch only."""

    clip_ids = tuple(f"clip-{row}" for row in range(10))

    def __init__(self, variant: str, value: float) -> None:
        super().__init__(variant)
        self.value = value

    def sample(self, index: int, draw: SampleDraw) -> dict[str, torch.Tensor]:
        sample = super().sample(index, draw)
        if index == ROW and draw.epoch == 0:
            sample["latents"][0, 0, 0, 0] = self.value
        return sample


def bad_step() -> int:
    """The step of the first epoch that has the bad row, from 0."""
    plan = plan_for(SyntheticSource("t2v-1.3b"))
    steps = [plan.step(step, 1) for step in range(plan.steps_per_epoch)]
    return next(s.step for s in steps if any(d.index == ROW for m in s.micro_steps for d in m.samples[0]))


def stop(base: str, output_dir: str, engine: str, value: float) -> str:
    source = BadSource("t2v-1.3b", value)
    trainer = small_trainer(base, output_dir, engine, source=source, save_steps=1, max_steps=6, logging_steps=100)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert all(weight.isfinite().all() for weight in full_weights(trainer).values())
    return str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stops_on_all_ranks_and_names_the_sample(layout: str, base: str, tmp_path: Path) -> None:
    run, number = tmp_path / "run", bad_step() + 1
    messages = run_ranks(stop, LAYOUTS[layout], base, str(run), layout, float("nan"), engine=layout)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"step {number}: the loss is not finite for clip-{ROW}. ")
    newest = run / f"checkpoint-{number - 1}" if number > 1 else None
    assert checkpoint.last_checkpoint(run) == newest
    assert (f"the newest complete checkpoint is {newest}" if newest else "there is no checkpoint yet") in messages[0]
    saved = [torch.load(run / f"nan-step-{number}-rank-{rank}.pt", weights_only=True) for rank in range(len(messages))]
    clips = [clip for part in saved for micro in part["clips"] for clip in micro]
    assert f"clip-{ROW}" in clips and len(clips) >= 4
    for part in saved:
        for batch, draws, losses in zip(part["micro_batches"], part["draws"], part["losses"]):
            for latents, draw, loss in zip(batch["latents"], draws, losses):
                assert torch.isnan(latents).any() == torch.isnan(loss) == (draw["index"] == ROW)


def skip(base: str, output_dir: str, engine: str, value: float) -> dict[str, Any]:
    source = BadSource("t2v-1.3b", value)
    steps = bad_step() + 1
    options = {"max_steps": steps, "save_steps": steps, "logging_steps": steps, "ema_decay": 0.5, **SCHEDULE}
    trainer = small_trainer(base, output_dir, engine, source=source, on_nan="skip", **options)
    trainer.train()
    result = {name: logged(trainer, name) for name in ("loss", "skipped_steps", "grad_norm")}
    result["rates"] = trainer.lr_scheduler.get_last_lr()
    return {**result, "weights": full_weights(trainer), "ema_steps": trainer.ema.steps["head.head.weight"]}


@pytest.mark.parametrize(("layout", "value"), [("single", float("inf")), *((name, float("nan")) for name in LAYOUTS)])
def test_a_skipped_step_is_not_taken(layout: str, value: float, base: str, tmp_path: Path) -> None:
    """The weights are those of the run without its last step, and the logged loss is the mean of the other steps."""
    results = run_ranks(skip, LAYOUTS[layout], base, str(tmp_path / "run"), layout, value, engine=layout)
    expected = run_ranks(before, LAYOUTS[layout], base, str(tmp_path / "short"), layout, engine=layout)[0]
    for result in results:
        assert result["skipped_steps"] == [1]
        assert result["ema_steps"] == bad_step()
        assert result["rates"] == pytest.approx([1e-4 * (bad_step() + 1)] * 2)  # the skipped step counts on all engines
        assert all(torch.equal(weight, expected["weights"][name]) for name, weight in result["weights"].items())
    for name in ("loss", "grad_norm"):
        assert results[0][name] == pytest.approx(expected[name], rel=1e-6)


def before(base: str, output_dir: str, engine: str) -> dict[str, Any]:
    """The run up to the bad step."""
    steps = bad_step()
    assert steps > 0
    trainer = small_trainer(
        base, output_dir, engine, max_steps=steps, save_steps=steps, logging_steps=steps, **SCHEDULE
    )
    trainer.train()
    return {
        "loss": logged(trainer, "loss"), "grad_norm": logged(trainer, "grad_norm"), "weights": full_weights(trainer),
    }  # fmt: skip


def skip_and_resume(base: str, output_dir: str) -> list[float]:
    """Skip a step between two log lines, save, and go on: the counts that the resumed run logs."""
    steps, options = bad_step() + 1, {"on_nan": "skip", "save_steps": 1, "logging_steps": 1}
    small_trainer(
        base, output_dir, "single", source=BadSource("t2v-1.3b", float("nan")), max_steps=steps,
        **{**options, "logging_steps": 100},
    ).train()  # fmt: skip
    trainer = small_trainer(base, output_dir, "single", max_steps=steps + 1, **options)
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-{steps}")
    return logged(trainer, "skipped_steps")


def test_skipped_steps_are_counted_over_a_resume(base: str, tmp_path: Path) -> None:
    assert run_ranks(skip_and_resume, 1, base, str(tmp_path), engine="single")[0] == [1]


def guard(tmp_path: Path) -> FiniteGuard:
    source = BadSource("t2v-1.3b", float("nan"))
    args = WanTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    return FiniteGuard(args, plan_for(source), source, ParallelDims(world_size=1), CheckpointWriter())


class Later:
    """A CUDA event for the test: the norm has not arrived before it is waited for."""

    def __init__(self, finite: torch.Tensor, value: bool) -> None:
        self.finite, self.value = finite, value

    def synchronize(self) -> None:
        self.finite.fill_(self.value)


def test_on_a_gpu_the_norm_is_read_a_step_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait where the step is: the norm of step 1 is read by step 2, or by a log line or checkpoint."""

    def to_host(norms: list[torch.Tensor]) -> tuple[torch.Tensor, Later]:
        finite = torch.ones(1, dtype=torch.bool)  # garbage until the copy has arrived
        return finite, Later(finite, bool(torch.isfinite(norms[0])))

    monkeypatch.setattr("wan_accel.nonfinite._to_host", to_host)
    step = {"step": 0, "micro_batches": []}
    good, bad = {"default": torch.tensor(1.0)}, {"default": torch.tensor(float("nan"))}
    first = guard(tmp_path)
    first.begin(step)
    assert first.left_out(bad) == frozenset()
    first.begin({**step, "step": 1})
    with pytest.raises(NonFiniteError, match="step 1: the losses are finite but the gradient norm is not"):
        first.left_out(good)
    second = guard(tmp_path)
    second.begin(step)
    second.left_out(good)
    second.flush()
    second.begin(step)
    second.left_out(bad)
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        second.flush()


def test_finite_losses_are_untouched_and_others_poison_every_gradient(tmp_path: Path) -> None:
    watch = guard(tmp_path).watch
    weight = torch.tensor([1e-3, 3.0], requires_grad=True)
    loss = (weight * torch.tensor([0.1, 1 / 3])).sum()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    watched = watch(loss.reshape(1), loss)
    assert torch.equal(watched, loss)
    assert torch.equal(torch.autograd.grad(watched, weight)[0], expected)
    # The squares overflow, their gradients do not: without the guard a step would be taken on an infinite loss.
    huge = (torch.tensor([2e19, 1.0]) * weight / weight.detach()).square().sum()
    assert huge.isinf()
    assert torch.autograd.grad(huge, weight, retain_graph=True)[0][1].isfinite()
    assert torch.autograd.grad(watch(huge.reshape(1), huge), weight)[0].isnan().all()


def test_state_says_failed(base: str, tmp_path: Path) -> None:
    assert run_ranks(run_bad, 1, base, str(tmp_path / "run"), engine="single")[0] == "NonFiniteError"
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["state"], state["step"]) == ("failed", bad_step())
    assert state["error"].startswith(f"NonFiniteError: step {bad_step() + 1}: the loss is not finite")


def run_bad(base: str, output_dir: str) -> str:
    from wan_accel.train import run

    trainer = small_trainer(base, output_dir, "single", source=BadSource("t2v-1.3b", float("nan")), max_steps=6)
    try:
        run(trainer, None)
    except NonFiniteError as error:
        return type(error).__name__
    return "nothing"


PAIR = VARIANTS["t2v-a14b"]


def mixed_step() -> tuple[int, int]:
    """A step that uses both experts of a pair, and a row of its high-noise samples."""
    plan = plan_for(SyntheticSource(PAIR.name), experts=PAIR.experts)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number, 1)
        if len(step.samples_of) == 2:
            return number, next(micro for micro in step.micro_steps if micro.expert == "high").samples[0][0].index
    raise AssertionError("no mixed step")


def skip_expert(output_dir: str, engine: str, world_size: int) -> tuple[Any, Any, dict[str, Any]]:
    """Weights before and after a mixed step with a bad sample of one expert, and the last log line."""
    from wan_accel.trainer import WanTrainer

    number, row = mixed_step()

    class Source(SyntheticSource):
        def sample(self, index: int, draw: SampleDraw) -> dict[str, torch.Tensor]:
            sample = super().sample(index, draw)
            if index == row:
                sample["latents"][0, 0, 0, 0] = float("nan")
            return sample

    args = WanTrainingArguments(
        output_dir=output_dir, max_steps=number + 1, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        use_cpu=not engine.startswith("zero"), ddp_backend="gloo" if world_size > 1 else None, global_batch=4,
        disable_tqdm=True, on_nan="skip", lr_scheduler_type="constant",
    )  # fmt: skip
    device = args.device
    source = Source(PAIR.name)
    model = ExpertPair({name: tiny_denoiser(PAIR.name).to(device) for name in ("high", "low")})
    recorder = _Before()
    plan = plan_for(source, experts=PAIR.experts)
    trainer = WanTrainer(model, args, source, plan, variant=PAIR, expert="both", callbacks=[recorder])
    recorder.trainer = trainer
    trainer.train()
    return recorder.weights, full_weights(trainer), [line for line in trainer.state.log_history if "loss" in line][-1]


class _Before(TrainerCallback):
    """Weights before the last step."""

    trainer: Any = None
    weights: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.state.global_step == self.trainer.args.max_steps - 1:
            self.weights = full_weights(self.trainer)


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("zero3", 2)])
def test_only_the_expert_that_is_not_finite_is_left_out(engine: str, processes: int, tmp_path: Path) -> None:
    for weights, after, line in run_ranks(skip_expert, processes, str(tmp_path), engine, processes, engine=engine):
        for name, weight in weights.items():
            assert torch.equal(weight, after[name]) == name.startswith("high."), name
        assert line["skipped_steps"] == 1 and line["loss_low"] > 0
        assert "loss_high" not in line and "grad_norm_high" not in line
        assert line["grad_norm"] == pytest.approx(line["grad_norm_low"], rel=1e-6)  # finite


def test_the_recipe_says_which() -> None:
    recipe = load_recipe("t2v-1.3b/lora", ["objective={preset: diffsynth, on_nan: skip}"])
    assert check(recipe) == []
    assert training_arguments(recipe)["on_nan"] == "skip"
    assert training_arguments(load_recipe("t2v-1.3b/lora"))["on_nan"] == "stop"
