"""Both experts of a pair in one run: one trajectory on every engine, equal to two plain training loops."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from synthetic import SyntheticSource, plan_for, tiny_denoiser
from transformers import Trainer

from wan_accel import checkpoint
from wan_accel.models.pair import ExpertPair, split_by_expert
from wan_accel.models.variants import VARIANTS
from wan_accel.step_plan import StepPlan

PAIR = VARIANTS["t2v-a14b"]
NUM_STEPS = 6
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
MAX_NORM = 0.5
LAYOUTS = {
    "single": ("single", 1, 1),
    "ddp-2": ("ddp", 2, 1),
    "fsdp2-2": ("fsdp2", 2, 1),
    "zero2-2": ("zero2", 2, 1),
    "zero3-2": ("zero3", 2, 1),
    "fsdp2-2-ulysses-2": ("fsdp2", 2, 2),
}


def pair_plan(source: SyntheticSource) -> StepPlan:
    return plan_for(source, experts=PAIR.experts)


def experts_of_steps(plan: StepPlan) -> list[set[str]]:
    return [set(plan.step(step, 1).samples_of) for step in range(NUM_STEPS)]


def tiny_experts() -> dict[str, Any]:
    """Two experts with different weights."""
    high = tiny_denoiser(PAIR.name)
    low = copy.deepcopy(high)
    for parameter in low.parameters():
        parameter.data.mul_(0.9)
    return {"high": high, "low": low}


def train(output_dir: str, engine: str, world_size: int, ulysses: int, resume: str | None = None) -> dict[str, Any]:
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.trainer import WanTrainer

    enable_fsdp_on_cpu()
    args = WanTrainingArguments(
        output_dir=output_dir, max_steps=NUM_STEPS, learning_rate=ADAMW["lr"], logging_steps=1, save_steps=1,
        save_total_limit=None, use_cpu=not engine.startswith("zero"), ddp_backend="gloo" if world_size > 1 else None,
        lr_scheduler_type="constant", global_batch=4, ulysses=ulysses, weight_decay=0.01, disable_tqdm=True,
        max_grad_norm=MAX_NORM, ema_decay=0.5,
    )  # fmt: skip
    device = args.device  # sets the process group up
    source = SyntheticSource(PAIR.name)
    model = ExpertPair({name: expert.to(device) for name, expert in tiny_experts().items()})
    trainer = WanTrainer(model, args, source, pair_plan(source), variant=PAIR, expert="both")
    trainer.train(resume_from_checkpoint=resume)
    return {"logs": [line for line in trainer.state.log_history if "loss" in line]}


def plain_loops() -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Each expert in a loop of its own over the plan, on one process: losses and weights after every step."""
    source, experts = SyntheticSource(PAIR.name), tiny_experts()
    decayed = set(Trainer.get_decay_parameter_names(None, experts["high"]))
    optimizers = {
        name: torch.optim.AdamW(
            [
                {"params": [p for n, p in expert.named_parameters() if n in decayed], "weight_decay": 0.01},
                {"params": [p for n, p in expert.named_parameters() if n not in decayed], "weight_decay": 0.0},
            ],
            **ADAMW,
        )
        for name, expert in experts.items()
    }
    losses, weights = [], []
    for number in range(NUM_STEPS):
        step, total = pair_plan(source).step(number, 1), 0.0
        for micro in step.micro_steps:
            for draw in micro.samples[0]:
                sample = {name: tensor[None] for name, tensor in source.sample(draw.index, draw).items()}
                latents, noise = sample["latents"], sample["noise"]
                noisy = (1 - draw.sigma) * latents + draw.sigma * noise
                out = experts[micro.expert](noisy, torch.tensor([1000.0 * draw.sigma]), sample["text"])
                loss = (out - (noise - latents)).square().mean() / step.num_samples
                loss.backward()
                total += loss.item()
        for name in step.samples_of:
            torch.nn.utils.clip_grad_norm_(experts[name].parameters(), MAX_NORM)
            optimizers[name].step()
            optimizers[name].zero_grad()
        losses.append(total)
        weights.append({f"{e}.{n}": p.detach().clone() for e, x in experts.items() for n, p in x.named_parameters()})
    return losses, weights


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    return plain_loops()


def test_the_plan_has_steps_of_one_expert_and_of_both() -> None:
    steps = experts_of_steps(pair_plan(SyntheticSource(PAIR.name)))
    assert {"high", "low"} in steps and {"high"} in steps
    # On two ranks such a step gives both ranks the same expert in every micro-step.
    plan = pair_plan(SyntheticSource(PAIR.name))
    mixed = plan.step(steps.index({"high", "low"}), 2)
    assert len({micro.expert for micro in mixed.micro_steps}) == 2
    assert all(len(hand) >= 1 for micro in mixed.micro_steps for hand in micro.samples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_equals_two_plain_loops(
    layout: str, expected: tuple[list[float], list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    engine, world_size, ulysses = LAYOUTS[layout]
    losses, weights = expected
    logs = run_ranks(train, world_size, str(tmp_path), engine, world_size, ulysses, engine=engine)[0]["logs"]
    assert [line["loss"] for line in logs] == pytest.approx(losses, rel=1e-5)
    steps = experts_of_steps(pair_plan(SyntheticSource(PAIR.name)))
    assert [{name for name in ("high", "low") if f"steps_{name}" in line} for line in logs] == steps
    for number in range(NUM_STEPS):
        found = checkpoint.read_trained(tmp_path / f"checkpoint-{number + 1}")
        assert found.keys() == weights[number].keys()
        for name, value in weights[number].items():
            bound = 1e-5 * max(value.norm().item(), 1.0)
            assert (found[name] - value).norm().item() <= bound, (number, name)
    only_high = steps.index({"high"}, 1)  # the step from checkpoint-N to checkpoint-(N + 1)
    for ema in (False, True):
        folders = [tmp_path / f"checkpoint-{only_high + after}" for after in (0, 1)]
        before, after = (checkpoint.read_trained(folder, ema=ema) for folder in folders)
        assert all(torch.equal(after[name], tensor) == name.startswith("low.") for name, tensor in before.items())
    counts = json.loads((tmp_path / f"checkpoint-{NUM_STEPS}" / "ema" / "ema.json").read_text())["steps"]
    taken = {name: sum(name in step for step in steps) for name in ("high", "low")}
    assert counts == {name: taken[name.split(".")[0]] for name in weights[-1]}


@pytest.mark.parametrize("layout", ["single", "fsdp2-2", "zero2-2", "zero3-2"])
def test_a_pair_is_resumed_exactly_where_one_expert_has_no_optimizer_state(layout: str, tmp_path: Path) -> None:
    engine, world_size, ulysses = LAYOUTS[layout]
    whole = run_ranks(train, world_size, str(tmp_path / "a"), engine, world_size, ulysses, engine=engine)[0]["logs"]
    steps = experts_of_steps(pair_plan(SyntheticSource(PAIR.name)))
    first = steps[0]
    assert len(first) == 1  # so that the other expert has not been stepped in checkpoint-1
    resumed = run_ranks(
        train, world_size, str(tmp_path / "b"), engine, world_size, ulysses, str(tmp_path / "a" / "checkpoint-1"),
        engine=engine,
    )[0]["logs"]  # fmt: skip
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    last = f"checkpoint-{NUM_STEPS}"
    for ema in (False, True):
        left, right = (checkpoint.read_trained(tmp_path / folder / last, ema=ema) for folder in ("a", "b"))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    manifest = json.loads((tmp_path / "b" / last / "manifest.json").read_text())
    assert manifest["expert"] == "both"


def test_groups_belong_to_one_expert() -> None:
    pair = ExpertPair(tiny_experts())
    parameters = list(pair.parameters())
    groups = [{"params": parameters[::2], "lr": 1.0}, {"params": parameters[1::2], "lr": 2.0}]
    split = split_by_expert(groups, pair)
    assert [group["lr"] for group in split] == [1.0, 1.0, 2.0, 2.0]
    owners = [{id(p) for p in expert.parameters()} for expert in (pair.high, pair.low)]
    assert all(any({id(p) for p in group["params"]} <= owner for owner in owners) for group in split)
    assert sum(len(group["params"]) for group in split) == len(parameters)
