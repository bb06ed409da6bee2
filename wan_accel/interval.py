"""What happened since the last log line: losses, steps and gradient norms of each expert, time spent on data."""

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Losses of an optimizer step. `loss_sums`: this rank's share, over the mean of ranks, of samples' summed loss."""

    loss: Tensor
    loss_sums: dict[str, Tensor]
    num_samples: dict[str, int]


class Interval:
    """What happened since the last log line. Losses stay on the device until it is written."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.data_seconds = 0.0
        self.save_seconds = 0.0
        self.loss_sums: dict[str, Tensor] = {}
        self.num_samples: Counter[str] = Counter()
        self.num_steps: Counter[str] = Counter()
        self.grad_norms: dict[str, Tensor | float] = {}
        self.grad_norm: Tensor | float | None = None

    def add(self, step: StepRecord, norms: Mapping[str, Tensor | float], left_out: Collection[str]) -> None:
        """Add a step but for the experts that were left out of it."""
        self.grad_norms |= {expert: norm for expert, norm in norms.items() if expert not in left_out}
        for expert in step.num_samples.keys() - set(left_out):
            self.loss_sums[expert] = self.loss_sums.get(expert, 0.0) + step.loss_sums[expert]
            self.num_samples[expert] += step.num_samples[expert]
            self.num_steps[expert] += 1

    def by_expert(self) -> dict[str, float]:
        """Mean loss, optimizer steps and last gradient norm of every expert that was used. Collective."""
        logs: dict[str, float] = {}
        for expert, count in sorted(self.num_samples.items()):  # the same on every rank
            loss = self.loss_sums[expert].clone()
            if dist.is_initialized():
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            logs[f"loss_{expert}"] = round(float(loss) / count, 6)
            logs[f"steps_{expert}"] = self.num_steps[expert]
        return logs | {f"grad_norm_{expert}": float(norm) for expert, norm in self.grad_norms.items()}


def joint_norm(norms: Mapping[str, Tensor | float]) -> Tensor | None:
    """The norm over all of some experts, None without one."""
    if not norms:
        return None
    return torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms.values()]).norm()
