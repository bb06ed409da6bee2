"""Ending a run that is told to stop: SIGTERM or SIGUSR1 on any rank, or the death of a rank's parent.

All ranks agree on a step, save it and leave with exit code 0; `run_state.json` says `preempted`, and the same command
goes on from there.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer

logger = logging.getLogger("wan_accel")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Set by torchrun and by accelerate, which starts a single process without torchrun.
_LAUNCHED = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}
_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its launcher ends, however that happens. Linux; else nothing.

    A launcher that is killed leaves ranks behind which hold their GPUs for ever. Without a launcher the parent is a
    shell, which nohup lets a run survive.
    """
    if not sys.platform.startswith("linux") or not _LAUNCHED & os.environ.keys():
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        logger.warning("prctl failed (%s): this rank will outlive its launcher", os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


class Preemption(TrainerCallback):
    """Asks all ranks after every step whether one of them was told to stop. Tells them too of a checkpoint that failed.

    The question costs an all-reduce of 8 bytes on a gloo group, outside of the GPU's queue.
    """

    def __init__(self, trainer: "WanTrainer") -> None:
        self.trainer = trainer
        self.signal: signal.Signals | None = None
        self.stopped = False
        self._group: Any = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Listen to signals, where Python lets us: in the main thread. Collective."""
        self.signal, self.stopped = None, False
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._handlers = {one: signal.signal(one, self._receive) for one in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop on all ranks if one was told to.

        Raises:
            SaveError: on all ranks, the checkpoint that was being written failed.
        """
        self.trainer.beat("asking all ranks whether to stop")
        is_asked, has_failed = self._any_rank(self.signal is not None, self.trainer.writer.failed)
        if self.signal is not None and not self.stopped:
            logger.warning("%s received: saving step %d and leaving", self.signal.name, state.global_step)
        if has_failed:
            self.trainer.writer.wait()
        if is_asked:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _any_rank(self, *mine: bool) -> list[bool]:
        """For each question, whether it is true on any rank. Collective."""
        answers = torch.tensor(mine, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(answers, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(answer) for answer in answers.tolist()]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Give signals back to whoever had them, once the last checkpoint is complete."""
        self.trainer.writer.wait()
        self.restore()

    def restore(self) -> None:
        """Give signals back to whoever had them."""
        for one, handler in self._handlers.items():
            signal.signal(one, handler)
        self._handlers = {}
