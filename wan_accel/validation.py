"""Validation by fixed noise: the loss of every noise level and expert over the same draws each time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from wan_accel.data.collate import collate
from wan_accel.draws import SampleDraw
from wan_accel.objective import per_sample_mse

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class BinLoss:
    """Mean loss of an expert at one noise level, and that of predicting zero, over `num_draws` draws."""

    expert: str
    sigma: float
    loss: float
    zero_loss: float
    num_draws: int


def fixed_losses(trainer: "WanTrainer", draws: Sequence[SampleDraw]) -> list[BinLoss]:
    """Losses over fixed draws, one forward each, by expert and noise level. Collective.

    Every data rank takes every n-th draw of an expert; a rank whose share is shorter repeats the last one and does
    not count it, as all ranks of a sharded model have to run the same expert the same number of times.
    """
    experts = [trainer.plan.expert_at(draw.sigma) for draw in draws]
    bins = sorted({(expert, draw.sigma) for expert, draw in zip(experts, draws)})
    sums = torch.zeros(len(bins), 3, dtype=torch.float64, device=trainer.accelerator.device)
    with trainer.evaluating():
        for name in sorted(set(experts)):
            own = [draw for expert, draw in zip(experts, draws) if expert == name]
            for draw, counts in share(own, trainer.data_rank, trainer.dims.num_data_ranks):
                trainer.beat("validation")
                predicted, target, mask = trainer._predict(name, collate(trainer.source, [draw]))
                losses = [per_sample_mse(guess, target, mask) for guess in (predicted, torch.zeros_like(predicted))]
                if counts:
                    row = torch.cat([*losses, torch.ones_like(losses[0])])
                    sums[bins.index((name, draw.sigma))] += row.double()
    if dist.is_initialized():
        dist.all_reduce(sums)  # over all ranks: the ranks of a Ulysses group count a draw alike
    means = (sums[:, :2] / sums[:, 2:]).tolist()
    counted = (sums[:, 2] / trainer.args.ulysses).tolist()
    return [
        BinLoss(expert=expert, sigma=sigma, loss=loss, zero_loss=zero, num_draws=round(count))
        for (expert, sigma), (loss, zero), count in zip(bins, means, counted)
    ]


def share(items: Sequence[Item], rank: int, num_ranks: int) -> Iterator[tuple[Item, bool]]:
    """One data rank's items, as many as every other rank has, and whether each counts."""
    for start in range(0, len(items), num_ranks):
        yield items[min(start + rank, len(items) - 1)], start + rank < len(items)


def as_metrics(bins: Sequence[BinLoss], prefix: str = "eval") -> dict[str, float]:
    """The names that losses are logged under.

    `eval_loss` and `eval_zero_loss` are means over all draws, `eval_loss/sigma_0.06` over those of one noise level.
    Experts of a pair come apart as well: `eval_loss_high`, `eval_loss_high/sigma_0.88`.
    """
    metrics = {f"{prefix}_loss": _mean(bins, "loss"), f"{prefix}_zero_loss": _mean(bins, "zero_loss")}
    for expert in sorted({item.expert for item in bins}):
        own = [item for item in bins if item.expert == expert]
        name = f"{prefix}_loss" if expert == "default" else f"{prefix}_loss_{expert}"
        metrics[name] = _mean(own, "loss")
        labels = sigma_labels([item.sigma for item in own])
        metrics |= {f"{name}/sigma_{label}": item.loss for label, item in zip(labels, own)}
    return metrics


def _mean(bins: Sequence[BinLoss], field: str) -> float:
    return sum(getattr(item, field) * item.num_draws for item in bins) / sum(item.num_draws for item in bins)


def sigma_labels(sigmas: Sequence[float]) -> list[str]:
    """Noise levels as text, with at least two decimals and as many as tell them apart."""
    for digits in range(2, 18):
        labels = [f"{sigma:.{digits}f}" for sigma in sigmas]
        if len(set(labels)) == len(sigmas):
            break
    return labels
