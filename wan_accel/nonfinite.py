"""What a loss or a gradient that is not finite does to a run: it stops and says which samples, or skips the step.

A loss that is not finite makes every gradient NaN (`FiniteGuard.watch`), and the gradient norm is the same on all
ranks, so its value tells every rank of every engine the same without a collective of its own.

Stopping costs no wait for the GPU: a step's norm is copied to the host beside the work and read when the next step
gets there, or before a log line, a validation or a checkpoint. Weights may by then have taken the bad step; no
checkpoint has. Skipping has to know before the optimizer runs and waits for the GPU once a step.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from wan_accel import checkpoint
from wan_accel.checkpoint_writer import CheckpointWriter
from wan_accel.data.collate import MicroBatch, SampleSource
from wan_accel.draws import SampleDraw
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.step_plan import StepPlan

if TYPE_CHECKING:
    from wan_accel.arguments import WanTrainingArguments

logger = logging.getLogger(__name__)
OnNan = Literal["stop", "skip"]


class NonFiniteError(RuntimeError):
    """A step whose loss or gradient is not finite."""


@dataclass(slots=True)
class _Watched:
    """A step in flight. `finite`, one an expert that it used, is a host tensor, valid once `ready` has happened."""

    step: int
    micro_batches: Sequence[MicroBatch]
    losses: list[Tensor] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    finite: Tensor | None = None
    ready: Any = None

    def bad_experts(self) -> frozenset[str]:
        if self.ready is not None:
            self.ready.synchronize()
        assert self.finite is not None
        return frozenset(expert for expert, is_finite in zip(self.experts, self.finite.tolist()) if not is_finite)


class FiniteGuard:
    """Watches the loss and the gradient norm of every optimizer step.

    Args:
        args: `on_nan` (`stop` raises; `skip` leaves the optimizer step of the expert out on all ranks and counts it),
            `output_dir` (where the batch of a bad step is saved) and the rank.
        plan: names the samples of a step.
        source: names its rows by their clip ids, where it has them.
        dims: which samples are this rank's.
        writer: of the run's checkpoints, whose newest one an error names.
    """

    def __init__(
        self,
        args: "WanTrainingArguments",
        plan: StepPlan,
        source: SampleSource,
        dims: ParallelDims,
        writer: CheckpointWriter,
    ) -> None:
        self.writer = writer
        self.on_nan = args.on_nan
        self.output_dir = Path(str(args.output_dir))
        self.rank = args.process_index
        self.plan = plan
        self.dims = dims
        self.clip_ids: Sequence[str] | None = getattr(source, "clip_ids", None)
        self.num_skipped = 0
        self.last_left_out: frozenset[str] = frozenset()
        self._skipped_since_log = self._steps_since_log = 0
        self._current: _Watched | None = None
        self._unread: _Watched | None = None

    def begin(self, inputs: dict[str, Any]) -> None:
        """A step starts: keep hold of its batch (step, micro_batches as in `StepDataset`)."""
        self._current = _Watched(step=inputs["step"], micro_batches=inputs["micro_batches"])

    def watch(self, per_sample: Tensor, loss: Tensor) -> Tensor:
        """`loss`, unchanged if finite; otherwise NaN with NaN gradients, even where those of an infinite loss are not.

        Args:
            per_sample: losses (B,) of a micro-batch, kept for the message.
            loss: the scalar that is going to be backpropagated.
        """
        if self._current is not None:
            self._current.losses.append(per_sample.detach())
        return loss * (1 + 0 * loss.detach())

    def logged(self, loss: Tensor) -> Tensor:
        """A step's loss for the log: 0 in place of what is going to be skipped (`correct` sees to the mean)."""
        return loss if self.on_nan == "stop" else loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def left_out(self, norms: Mapping[str, Tensor | float]) -> frozenset[str]:
        """Experts whose step must not be taken, by their gradient norms (equal on all ranks), before it is.

        Collective where a norm is not finite.

        Raises:
            NonFiniteError: this step or the one before was not finite, and the run is to stop.
        """
        watched, self._current = self._current, None
        self.flush()
        assert watched is not None
        watched.experts = sorted(norms)
        watched.finite, watched.ready = _to_host([norms[expert] for expert in watched.experts])
        self._steps_since_log += 1
        self.last_left_out = frozenset()
        if self.on_nan == "stop" and watched.ready is not None:
            self._unread = watched
        elif bad := watched.bad_experts():
            if self.on_nan == "stop":
                raise self._error(watched)
            self._skip(watched, bad)
        return self.last_left_out

    def _skip(self, watched: _Watched, experts: frozenset[str]) -> None:
        self.last_left_out = experts
        self.num_skipped += 1
        self._skipped_since_log += 1
        clips = _gather(self._bad_clips(watched))
        if self.rank == 0:
            logger.warning("step %d is skipped: %s", watched.step + 1, _describe(clips))

    def flush(self) -> None:
        """Wait for the last step's norm; call it before anything of the weights is kept. Collective when it raises.

        Raises:
            NonFiniteError: it is not finite.
        """
        unread, self._unread = self._unread, None
        if unread is not None and unread.bad_experts():
            raise self._error(unread)

    def correct(self, logs: dict[str, float]) -> dict[str, float]:
        """Log lines: the mean loss over the steps that were taken, and how many were not so far."""
        taken = self._steps_since_log - self._skipped_since_log
        if "loss" in logs and self._skipped_since_log:
            logs["loss"] = logs["loss"] * self._steps_since_log / taken if taken else math.nan
        if "loss" in logs:
            self._steps_since_log = self._skipped_since_log = 0
            if self.num_skipped:
                logs["skipped_steps"] = self.num_skipped
        return logs

    def _error(self, watched: _Watched) -> NonFiniteError:
        """Save this rank's batch and say what happened, the same on all ranks. Collective."""
        clips = _gather(self._bad_clips(watched))
        self._save_batch(watched)  # after the collective: a full disk on one rank must not leave the others waiting
        self.writer.settle()  # a step before this one may be being written
        newest = checkpoint.last_checkpoint(self.output_dir)
        go_on = f"the newest complete checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return NonFiniteError(
            f"step {watched.step + 1}: {_describe(clips)}. The batches are in "
            f"{self.output_dir}/nan-step-{watched.step + 1}-rank-*.pt; nothing of this step was saved and {go_on}. "
            "Look at these clips, lower training.learning_rate, or set objective.on_nan: skip to leave such steps out"
        )

    def _bad_clips(self, watched: _Watched) -> list[str]:
        """Names of this rank's samples whose loss is not finite."""
        names = []
        for draws, losses in zip(self._draws(watched.step), watched.losses):
            names += [self._name(draw) for draw, loss in zip(draws, losses.tolist()) if not math.isfinite(loss)]
        return names

    def _draws(self, step: int) -> list[Sequence[SampleDraw]]:
        """This rank's samples of every micro-batch of a step."""
        data_rank, num_data_ranks = self.dims.data_rank(self.rank), self.dims.num_data_ranks
        return [micro.samples[data_rank] for micro in self.plan.step(step, num_data_ranks).micro_steps]

    def _name(self, draw: SampleDraw) -> str:
        return self.clip_ids[draw.index] if self.clip_ids is not None else f"row {draw.index}"

    def _save_batch(self, watched: _Watched) -> None:
        """`nan-step-<N>-rank-<R>.pt`: tensors, draws and losses, for `torch.load(weights_only=True)`."""
        draws = self._draws(watched.step)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "step": watched.step + 1,
                "rank": self.rank,
                "micro_batches": [{k: v.cpu() for k, v in batch.items()} for batch in watched.micro_batches],
                "draws": [[asdict(draw) for draw in micro] for micro in draws],
                "clips": [[self._name(draw) for draw in micro] for micro in draws],
                "losses": [losses.cpu() for losses in watched.losses],
            },
            self.output_dir / f"nan-step-{watched.step + 1}-rank-{self.rank}.pt",
        )


def _to_host(norms: Sequence[Tensor | float]) -> tuple[Tensor, Any]:
    """Whether norms are finite, as a host tensor, and the event after which it is valid (None: it is already)."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float32).detach() for norm in norms])
    finite = torch.isfinite(stacked) & (stacked >= 0)  # some DeepSpeed versions report -1 for one that is not
    if not finite.is_cuda:
        return finite, None
    host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _gather(names: list[str]) -> list[str]:
    """Names of all ranks, each once, in order. Collective over all ranks."""
    if not dist.is_initialized():
        return list(dict.fromkeys(names))
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, names)
    return list(dict.fromkeys(name for part in parts for name in part))


def _describe(clips: Sequence[str]) -> str:
    if not clips:
        return "the losses are finite but the gradient norm is not"
    return f"the loss is not finite for {', '.join(clips)}"
