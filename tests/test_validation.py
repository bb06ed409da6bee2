"""Losses by noise level and expert, and drawn latents: the same on every layout, and training does not notice."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from synthetic import GLOBAL_BATCH, LATENTS, NUM_ROWS, SyntheticSource, plan_for, tiny_denoiser

from wan_accel.held_out import fixed_draws, split_groups
from wan_accel.metrics import losses_by_sigma, plot_losses_by_sigma
from wan_accel.models.variants import VARIANTS
from wan_accel.recipe.schema import SampleVideos
from wan_accel.validation import BinLoss, as_metrics, sigma_labels

PAIR = VARIANTS["t2v-a14b"]
NUM_STEPS = 2
ROWS = [0, 1, 2]  # two shapes; three clips on two ranks leave a filler
SETTINGS = SampleVideos(num_clips=3, num_steps=4, guidance=2.0)
LAYOUTS = {
    "ddp-2": ("ddp", 2, 1),
    "fsdp2-2": ("fsdp2", 2, 1),
    "zero3-2": ("zero3", 2, 1),
    "fsdp2-2-ulysses-2": ("fsdp2", 2, 2),
}


def draws_of(source: SyntheticSource) -> list[Any]:
    """Three noise levels of each expert on every row: an odd number for two ranks."""
    return [
        draw
        for expert in PAIR.experts
        for draw in fixed_draws(source.index(), ROWS, num_sigmas=3, seed=0, expert=expert)
    ]


def train(output_dir: str, engine: str, world_size: int, ulysses: int, *, validates: bool = True) -> dict[str, Any]:
    """Train a pair, evaluating and drawing before every step; what came out at the end."""
    from transformers import TrainerCallback

    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.models.pair import ExpertPair
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.sample_drawing import draw_share, gather, sample_draws
    from wan_accel.trainer import WanTrainer

    enable_fsdp_on_cpu()
    args = WanTrainingArguments(
        output_dir=output_dir, max_steps=NUM_STEPS, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        use_cpu=engine != "zero3", ddp_backend="gloo" if world_size > 1 else None, lr_scheduler_type="constant",
        global_batch=GLOBAL_BATCH, ulysses=ulysses, disable_tqdm=True,
    )  # fmt: skip
    device = args.device  # sets the process group up
    source = SyntheticSource(PAIR.name)
    high, low = tiny_denoiser(PAIR.name).to(device), tiny_denoiser(PAIR.name).to(device)
    for parameter in low.parameters():
        parameter.data.mul_(0.9)
    trainer = WanTrainer(
        ExpertPair({"high": high, "low": low}), args, source, plan_for(source, experts=PAIR.experts), variant=PAIR,
        expert="both", eval_draws=draws_of(source),
    )  # fmt: skip
    results: dict[str, Any] = {}

    class Validate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            results["metrics"] = trainer.evaluate()
            drawn = gather(draw_share(trainer, sample_draws(source.index(), ROWS, seed=0), SETTINGS))
            results["latents"] = [drawn[position] for position in range(len(ROWS))]

    if validates:
        trainer.add_callback(Validate())
    trainer.train()
    return {**results, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(train, 1, str(tmp_path_factory.mktemp("single")), "single", 1, 1, engine="single")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_measure_and_draw_the_same(layout: str, single: dict[str, Any], tmp_path: Path) -> None:
    engine, world_size, ulysses = LAYOUTS[layout]
    for rank in run_ranks(train, world_size, str(tmp_path), engine, world_size, ulysses, engine=engine):
        assert rank["metrics"] == pytest.approx(single["metrics"], rel=1e-5)
        for found, expected in zip(rank["latents"], single["latents"], strict=True):
            assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)


def test_validation_leaves_training_alone(single: dict[str, Any], tmp_path: Path) -> None:
    without = run_ranks(_train_only, 1, str(tmp_path), engine="single")[0]
    assert without["losses"] == single["losses"]


def _train_only(output_dir: str) -> dict[str, Any]:
    return train(output_dir, "single", 1, 1, validates=False)


def test_drawn_latents_have_the_clips_shapes(single: dict[str, Any]) -> None:
    assert [tuple(latents.shape) for latents in single["latents"]] == [
        (16, *LATENTS[0]), (16, *LATENTS[0]), (16, *LATENTS[1])
    ]  # fmt: skip
    assert all(latents.std() > 0.1 for latents in single["latents"])


def test_losses_are_those_of_each_noise_level(tmp_path: Path) -> None:
    """Before training, against the formula on one model."""
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.trainer import WanTrainer

    source, model = SyntheticSource("t2v-1.3b"), tiny_denoiser("t2v-1.3b")
    draws = fixed_draws(source.index(), ROWS, num_sigmas=8, seed=0)
    args = WanTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = WanTrainer(model, args, source, plan_for(source), variant=VARIANTS["t2v-1.3b"], eval_draws=draws)
    metrics = trainer.evaluate()
    assert len(metrics) == 2 + 8
    losses = {}
    for draw in draws:
        sample = {name: tensor[None] for name, tensor in source.sample(draw.index, draw).items()}
        noisy = (1 - draw.sigma) * sample["latents"] + draw.sigma * sample["noise"]
        with torch.no_grad():
            out = model(noisy, torch.tensor([1000 * draw.sigma]), sample["text"])
        losses[draw.index, draw.sigma] = float((out - (sample["noise"] - sample["latents"])).square().mean())
    for level in range(8):
        sigma = (level + 0.5) / 8
        expected = sum(losses[row, sigma] for row in ROWS) / len(ROWS)
        assert metrics[f"eval_loss/sigma_{sigma:.2f}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: line[name] for name in metrics} == metrics
    before = trainer._logged.started
    with trainer.untimed():
        time.sleep(0.1)
    assert 0.1 <= trainer._logged.started - before < time.perf_counter() - before


def bin_loss(expert: str, sigma: float, loss: float, num_draws: int = 1) -> BinLoss:
    return BinLoss(expert=expert, sigma=sigma, loss=loss, zero_loss=2 * loss, num_draws=num_draws)


def test_names_of_metrics() -> None:
    pair = [bin_loss("high", 0.9, 4.0), bin_loss("high", 0.95, 2.0), bin_loss("low", 0.4, 1.0, num_draws=2)]
    assert as_metrics(pair) == {
        "eval_loss": 2.0, "eval_zero_loss": 4.0, "eval_loss_high": 3.0, "eval_loss_high/sigma_0.90": 4.0,
        "eval_loss_high/sigma_0.95": 2.0, "eval_loss_low": 1.0, "eval_loss_low/sigma_0.40": 1.0,
    }  # fmt: skip
    assert list(as_metrics([bin_loss("default", 0.0625, 1.0)], "x")) == ["x_loss", "x_zero_loss", "x_loss/sigma_0.06"]
    assert sigma_labels([0.876953125, 0.880859375]) == ["0.877", "0.881"]
    assert sigma_labels([0.5]) == ["0.50"]


def test_picture_by_sigma(tmp_path: Path) -> None:
    lines = [
        {"step": step, "eval_loss": 1.0, "eval_loss/sigma_0.06": 1.0 - step / 100, "eval_loss/sigma_0.94": 0.2}
        for step in (0, 20, 40)
    ]
    lines.insert(1, {"step": 10, "loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert losses_by_sigma(lines)[1] == (20, {0.06: 0.8, 0.94: 0.2})
    again = [*lines, {"step": 20, "eval_loss/sigma_0.06": 0.7}]  # a resumed run evaluates where it starts once more
    assert [step for step, _ in losses_by_sigma(again)] == [0, 20, 40]
    assert losses_by_sigma(again)[1] == (20, {0.06: 0.7})
    plot_losses_by_sigma(tmp_path / "metrics.jsonl", tmp_path / "by_sigma.png")
    assert (tmp_path / "by_sigma.png").stat().st_size > 5000
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]))
    plot_losses_by_sigma(tmp_path / "metrics.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_clips_of_a_source_stay_together() -> None:
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"]
    for seed in range(5):
        train_rows, eval_rows = split_groups(groups, fraction=0.3, seed=seed)
        assert not {groups[row] for row in train_rows} & {groups[row] for row in eval_rows}
        assert len(eval_rows) >= 3 and sorted(train_rows + eval_rows) == list(range(NUM_ROWS))
