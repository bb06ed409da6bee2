"""Settings of optimizer and schedule: a resumed run takes them from its recipe, and state from its checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The schedule decides the rates. How an update is computed is left as its state was written (a fused AdamW counts
# steps on the GPU), and is no setting that changes a result.
_NO_SETTINGS = {"params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
_NAMES = {"betas": "(adam_beta1, adam_beta2)", "eps": "adam_epsilon"}


class IntervalsCallback(TrainerCallback):
    """Logs, saves and evaluates as often as the recipe says: Trainer reads the intervals of a checkpoint's state."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a recipe says of each parameter group: weight decay, betas, momentum and the like."""
    groups = optimizer.param_groups
    return [{name: value for name, value in group.items() if name not in _NO_SETTINGS} for group in groups]


def put_settings(optimizer: torch.optim.Optimizer, settings: Sequence[dict[str, Any]]) -> list[str]:
    """Put settings over those that a checkpoint has brought; returns `name: old -> new` of each that differs."""
    changes = []
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        for name, value in wanted.items():
            if _plain(group.get(name)) != _plain(value):
                changes.append(f"{_NAMES.get(name, name)}: {group.get(name)} -> {value}")
            group[name] = value
    return list(dict.fromkeys(changes))


def resume_schedule(scheduler: Any, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """Go on with a schedule at the step of a checkpoint: learning_rate * factor(step), both as the recipe has them.

    Args:
        scheduler: of this run, not stepped yet. One that keeps its rate as state (`reduce_lr_on_plateau`, `greedy`)
            goes on with that of the checkpoint.
        state: the checkpoint's.
        optimizer: whose groups get their rate.

    Returns:
        `name: old -> new` of the learning rate, and of that of the next step, where they differ.

    Raises:
        ValueError: the checkpoint's schedule is of the other kind.
    """
    if ("base_lrs" in state) != isinstance(scheduler, LambdaLR):
        raise ValueError(
            "training.lr_scheduler_type: a schedule that follows the loss (reduce_lr_on_plateau, greedy) and one that "
            "follows the step cannot replace each other in a resumed run: use the type that the run began with"
        )
    if not isinstance(scheduler, LambdaLR):
        scheduler.load_state_dict(state)
        return []
    old, new = state["base_lrs"], scheduler.base_lrs
    scheduler.load_state_dict({**state, "base_lrs": new})
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(new, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, base, rate in zip(optimizer.param_groups, new, rates, strict=True):
        _set_rate(group, "initial_lr", base)
        _set_rate(group, "lr", rate)
    changes = [("learning_rate", *pair) for pair in zip(old, new)]
    changes += [("learning rate of the next step", *pair) for pair in zip(state["_last_lr"], rates)]
    found = [f"{name}: {float(before):g} -> {float(after):g}" for name, before, after in changes if before != after]
    return list(dict.fromkeys(found))


def _set_rate(group: dict[str, Any], name: str, rate: Any) -> None:
    """Torchao's optimizers keep rates in tensors."""
    if isinstance(group.get(name), Tensor):
        group[name].fill_(rate)
    else:
        group[name] = rate


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
