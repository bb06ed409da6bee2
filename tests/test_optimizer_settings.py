"""A resumed run takes learning rate, decay, betas and schedule from its recipe, on every engine; and says so."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import full_weights, logged, small_trainer
from synthetic import SyntheticSource, plan_for, tiny_denoiser
from transformers import get_scheduler

from wan_accel import checkpoint
from wan_accel.models.variants import VARIANTS
from wan_accel.optimizer_settings import put_settings, resume_schedule, settings_of
from wan_accel.run_checkpoints import check_same_run

PAIR = VARIANTS["t2v-a14b"]
# Not moved by a learning rate of 0: what a step does is told by the rate alone.
CHANGED = {
    "learning_rate": 0.0, "weight_decay": 0.25, "adam_beta1": 0.5, "adam_epsilon": 1e-6, "max_steps": 3, "seed": 7,
    "caption_dropout": 0.5,
}  # fmt: skip


def change(base: str, output_dir: str, engine: str) -> dict[str, Any]:
    """Train two steps, resume with other settings, unwind: what one step more did and what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("wan_accel").addHandler(handler)
    small_trainer(base, output_dir, engine, max_steps=2, weight_decay=0.01).train()
    trainer = small_trainer(base, output_dir, engine, **CHANGED)
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2")
    return outcome(trainer, records)


def outcome(trainer: Any, records: list[str]) -> dict[str, Any]:
    groups = [
        {name: group[name] for name in ("lr", "initial_lr", "weight_decay", "betas", "eps")}
        for group in trainer.optimizer.param_groups
    ]
    rates = logged(trainer, "learning_rate")
    return {"groups": groups, "rates": rates, "weights": full_weights(trainer), "records": records}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


def assert_changed(result: dict[str, Any], before: dict[str, torch.Tensor]) -> None:
    assert {group["weight_decay"] for group in result["groups"]} == {0.0, 0.25}
    for group in result["groups"]:
        assert (group["lr"], group["initial_lr"], tuple(group["betas"]), group["eps"]) == (0, 0, (0.5, 0.999), 1e-6)
    assert result["rates"][-1] == 0
    assert all(torch.equal(result["weights"][name], value) for name, value in before.items())


@pytest.mark.parametrize(("engine", "processes"), [("single", 1), ("fsdp2", 2)])
def test_the_recipe_wins(engine: str, processes: int, base: str, tmp_path: Path) -> None:
    results = run_ranks(change, processes, base, str(tmp_path), engine, engine=engine)
    before = checkpoint.read_trained(tmp_path / "checkpoint-2")
    for rank, result in enumerate(results):
        assert_changed(result, before)
        lines = [line for line in result["records"] if "resumed from checkpoint-2" in line]
        assert len(lines) == (rank == 0)
    logged_lines = "\n".join(results[0]["records"])
    assert "weight_decay: 0.01 -> 0.25; " in logged_lines
    assert "(adam_beta1, adam_beta2): (0.9, 0.999) -> (0.5, 0.999); adam_epsilon: 1e-08 -> 1e-06" in logged_lines
    assert "learning_rate: 0.001 -> 0; learning rate of the next step: 0.001 -> 0" in logged_lines
    assert "with other settings of the recipe: seed: 42 -> 7; caption_dropout: 0.0 -> 0.5; " in logged_lines
    saved = checkpoint.read_manifest(tmp_path / "checkpoint-2")
    assert saved.settings is not None
    other = replace(saved, settings={**saved.settings, "optim": "sgd"})
    with pytest.raises(ValueError, match=r"training\.optim=adamw_torch_fused, which sgd cannot go on from: resume"):
        check_same_run(tmp_path / "checkpoint-2", saved, other)
    check_same_run(tmp_path / "checkpoint-2", saved, replace(saved, settings=None))  # of an earlier version


def change_pair(output_dir: str, engine: str, processes: int) -> dict[str, Any]:
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.models.pair import ExpertPair
    from wan_accel.trainer import WanTrainer

    def trainer(**options: Any) -> WanTrainer:
        args = WanTrainingArguments(
            output_dir=output_dir, logging_steps=1, save_steps=1, use_cpu=engine != "zero3", global_batch=4,
            ddp_backend="gloo" if processes > 1 else None, disable_tqdm=True, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        device, source = args.device, SyntheticSource(PAIR.name)
        model = ExpertPair({name: tiny_denoiser(PAIR.name).to(device) for name in ("high", "low")})
        return WanTrainer(model, args, source, plan_for(source, experts=PAIR.experts), variant=PAIR, expert="both")

    trainer(max_steps=1, learning_rate=1e-3, weight_decay=0.01).train()
    again = trainer(**CHANGED)
    again.train(resume_from_checkpoint=f"{output_dir}/checkpoint-1")
    return outcome(again, [])


def test_of_both_experts_zero3_engines(tmp_path: Path) -> None:
    results = run_ranks(change_pair, 2, str(tmp_path), "zero3", 2, engine="zero3")
    before = checkpoint.read_trained(tmp_path / "checkpoint-1")
    assert {name.split(".")[0] for name in before} == {"high", "low"}
    for result in results:
        assert len(result["groups"]) == 4
        assert_changed(result, before)


def scheduled(kind: str, lr: float = 1.0, steps: int = 10, **optimizer: Any) -> tuple[torch.optim.Optimizer, Any]:
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, **optimizer)
    return adamw, get_scheduler(kind, adamw, num_warmup_steps=0, num_training_steps=steps)


def test_the_schedule_is_the_recipes_at_the_checkpoints_step() -> None:
    adamw, schedule = scheduled("linear")
    for _ in range(4):
        adamw.step()
        schedule.step()
    state = schedule.state_dict()
    for kind, lr, steps, rate, base in [
        ("linear", 1.0, 10, 0.6, ""), ("linear", 1.0, 20, 0.8, ""), ("constant", 1.0, 10, 1.0, ""),
        ("linear", 0.5, 10, 0.3, "learning_rate: 1 -> 0.5; "),
    ]:  # fmt: skip
        other, resumed = scheduled(kind, lr, steps)
        changes = "; ".join(resume_schedule(resumed, state, other))
        assert changes == ("" if rate == 0.6 else f"{base}learning rate of the next step: 0.6 -> {rate:g}")
        assert resumed.get_last_lr() == pytest.approx([rate]) and other.param_groups[0]["lr"] == pytest.approx(rate)
        other.step()
        resumed.step()
        assert resumed.last_epoch == 5 and resumed.base_lrs == [lr]


def test_a_schedule_that_follows_the_loss_keeps_its_rate() -> None:
    adamw, schedule = scheduled("reduce_lr_on_plateau")
    for _ in range(12):
        schedule.step(1.0)
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.1)
    other, resumed = scheduled("reduce_lr_on_plateau")
    other.load_state_dict(adamw.state_dict())
    assert resume_schedule(resumed, schedule.state_dict(), other) == []
    assert other.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"lr_scheduler_type: .* use the type that the run began with"):
        resume_schedule(scheduled("constant")[1], schedule.state_dict(), other)


def test_what_is_no_setting_stays_the_checkpoints() -> None:
    """A fused AdamW counts on the GPU, others on the CPU: the flag belongs to the state."""
    saved, _ = scheduled("constant", weight_decay=0.5)
    fresh, _ = scheduled("constant", fused=True)
    settings = settings_of(fresh)
    fresh.load_state_dict(saved.state_dict())
    assert put_settings(fresh, settings) == ["weight_decay: 0.5 -> 0.01"]
    assert fresh.param_groups[0]["fused"] is None
