"""Ends a run in which a rank has died or hangs, with the rank's name, what it was doing, and its stack.

A thread of every rank posts where its main thread is every few seconds; rank 0's reads all of them. What survivors
show otherwise is a time-out of some collective after half an hour, on every rank but the one that is to blame.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from wan_accel.parallel.agreement import from_main_rank
from wan_accel.watchdog_posts import Post, describe_failed, describe_hang, describe_silent, furthest_behind

logger = logging.getLogger("wan_accel")
EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: the same command may well go on
_PERIOD_SECONDS = 5.0
_SILENT_SECONDS = 60.0
_NUM_STACKS = 3


class Watchdog:
    """One for a run and rank. Collective: it connects to a store on rank 0.

    Args:
        rank, world_size: this process.
        hang_seconds: how long a rank may stay where it is. A rank that gives no sign of life at all, or has failed
            while the others go on, is given up after that or a minute.
        stack_file: where C code writes this process's stacks if not even the thread can run.
        on_end: called on rank 0 with the message before the process ends.
    """

    def __init__(
        self, *, rank: int, world_size: int, hang_seconds: float, stack_file: Path, on_end: Callable[[str], None]
    ) -> None:
        self._rank, self._world_size, self._on_end = rank, world_size, on_end
        self._hang_seconds, self._silent_seconds = hang_seconds, min(hang_seconds, _SILENT_SECONDS)
        self._period = min(_PERIOD_SECONDS, hang_seconds / 8)
        stack_file.parent.mkdir(parents=True, exist_ok=True)
        self._stack_file = stack_file.open("w")
        self._watched = threading.get_ident()
        self._position, self._doing, self._at, self._seq = (0, 0), "getting ready", time.monotonic(), 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank 0: each rank's last seq, and when it was new
        self._failed_since: float | None = None
        self._left, self._has_dumped = "", False
        self._store = _connect(rank, self._silent_seconds)
        self._post()
        if dist.is_initialized():
            dist.barrier()  # every rank has posted
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str) -> None:
        """The main thread passes a station. All ranks pass the same ones, so that their positions can be compared."""
        station = self._position[1] + 1 if step == self._position[0] else 0
        self._position, self._doing, self._at = (step, station), doing, time.monotonic()

    def stop(self, error: BaseException | None = None) -> None:
        """This rank is done, or an error has ended it: it is not to be missed."""
        self._left = "finished" if error is None else f"{type(error).__name__}: {_first_line(error)}"
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stack_file.close()
        if not os.path.getsize(self._stack_file.name):
            os.unlink(self._stack_file.name)

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._stopped.wait(self._period):
            faulthandler.dump_traceback_later(self._silent_seconds, file=self._stack_file)
            try:
                self._turn()
                answered = time.monotonic()
            except RuntimeError as error:  # torch's DistError: rank 0's store does not answer
                if time.monotonic() - answered > self._silent_seconds:
                    self._end(f"rank 0 gave no sign of life for {self._silent_seconds:.0f} s ({_first_line(error)})")
        with suppress(RuntimeError):  # rank 0 may have left before
            self._post()

    def _turn(self) -> None:
        self._post()
        if self._store.check(["dump"]):
            self._dump()
        if self._rank == 0 and (verdict := self._judge()):
            self._store.set("verdict", verdict)
        if self._store.check(["verdict"]):
            self._end(self._store.get("verdict").decode())

    def _post(self) -> None:
        self._seq += 1
        post = Post(
            seq=self._seq, position=self._position, doing=self._doing, idle_seconds=time.monotonic() - self._at,
            host=socket.gethostname(), pid=os.getpid(), left=self._left,
        )  # fmt: skip
        self._store.set(f"post/{self._rank}", post.encode())

    def _dump(self) -> None:
        if self._has_dumped:
            return
        self._has_dumped = True
        stack = "".join(traceback.format_stack(sys._current_frames()[self._watched]))
        logger.warning("a rank hangs; this one is %s, after step %d:\n%s", self._doing, self._position[0], stack)
        self._store.set(f"stack/{self._rank}", stack)

    def _judge(self) -> str | None:
        """On rank 0: look at all posts; why the run is to be given up, None if it is not."""
        now = time.monotonic()
        found = self._store.multi_get([f"post/{rank}" for rank in range(self._world_size)])
        posts = {rank: Post.decode(content) for rank, content in enumerate(found)}
        for rank, post in posts.items():
            if rank not in self._seen or self._seen[rank][0] != post.seq:
                self._seen[rank] = (post.seq, now)
        active = {rank: post for rank, post in posts.items() if not post.left}
        failed = [rank for rank, post in posts.items() if post.left not in ("", "finished")]
        if failed and active:  # an error that all ranks share reaches all of them soon
            self._failed_since = self._failed_since or now
            if now - self._failed_since > self._silent_seconds:
                return describe_failed(posts, failed)
        if silent := [rank for rank in active if now - self._seen[rank][1] > self._silent_seconds]:
            return describe_silent(posts, silent, self._silent_seconds)
        if any(post.idle_seconds > self._hang_seconds for post in active.values()):
            behind = furthest_behind(active)
            return describe_hang(active, behind, self._stacks(behind[:_NUM_STACKS]))
        return None

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """The stacks of ranks, as far as they can still say them; all ranks write their own to their logs."""
        self._store.set("dump", "1")
        self._dump()
        deadline = time.monotonic() + 3 * self._period
        while time.monotonic() < deadline and not self._store.check([f"stack/{rank}" for rank in ranks]):
            time.sleep(self._period / 10)
        said = [rank for rank in ranks if self._store.check([f"stack/{rank}"])]
        return {rank: self._store.get(f"stack/{rank}").decode() for rank in said}

    def _end(self, message: str) -> NoReturn:
        message = f"{message}. The run ends; the same command goes on from the newest checkpoint"
        logger.error("%s", message)
        if self._rank == 0:
            self._on_end(message)
            time.sleep(2 * self._period)  # the store ends with this process: let others read the verdict
        os._exit(EXIT_CODE)


def _connect(rank: int, timeout_seconds: float) -> dist.Store:
    """A store of its own on rank 0: a thread that waits in the default one would hold up everybody else."""
    if not dist.is_initialized():
        return dist.HashStore()
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if rank == 0 else None
    port = from_main_rank(lambda: store.port)  # type: ignore[union-attr]
    return store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
