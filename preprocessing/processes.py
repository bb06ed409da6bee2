"""Workers in processes of their own: a native crash or a hang ends one of them, not the run."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from preprocessing.inputs import Source
from preprocessing.ledger import Outcome
from preprocessing.settings import ModelFiles, Runtime, Settings

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """What a worker process needs to open its pipeline."""

    settings: Settings
    models: ModelFiles | None
    runtime: Runtime
    output: Path
    name: str
    job: str
    scratch: Path
    commit_seconds: float
    described: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class WorkerProcess:
    """A worker process as its job sees it.

    current: the video it works on, since `started` (monotonic seconds). uncommitted: videos done that do not count yet.
    """

    setup: WorkerSetup
    process: Any
    connection: Connection
    current: Source | None = None
    started: float = 0.0
    is_ready: bool = False
    uncommitted: list[tuple[Source, Outcome]] = field(default_factory=list)

    def send(self, source: Source, skip: frozenset[str]) -> None:
        """Give it a video."""
        self.current, self.started = source, time.monotonic()
        self.connection.send(("video", source, skip))

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def start_worker(setup: WorkerSetup) -> WorkerProcess:
    """Start a process; it says `ready` when its networks are open."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(setup, theirs, os.getpid()), name=setup.name, daemon=True)
    process.start()
    theirs.close()
    return WorkerProcess(setup=setup, process=process, connection=ours)


def _main(setup: WorkerSetup, connection: Connection, parent: int) -> None:
    """Open the networks, then work on what comes through the pipe until it says `close`.

    Messages out: ready; done, outcome; committed, keys; lost, text; failed, text (and the end).
    """
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the job decides what to do
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        _serve(replace(setup, runtime=_alone_with_its_gpu(setup.runtime)), connection)
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the job is gone, and nobody is left to tell
    except (ValueError, OSError) as error:
        connection.send(("failed", str(error)))


def _serve(setup: WorkerSetup, connection: Connection) -> None:
    from preprocessing.pipeline import Pipeline
    from preprocessing.worker import LeaseLost, Worker

    pipeline = Pipeline(setup.settings, setup.models, runtime=setup.runtime, described=setup.described)
    worker = Worker(pipeline, setup.output, name=setup.name, job=setup.job, scratch=setup.scratch)
    connection.send(("ready", None))
    committed = time.monotonic()

    def commit() -> None:
        nonlocal committed
        try:
            connection.send(("committed", worker.commit()))
        except LeaseLost as error:
            connection.send(("lost", str(error)))
        committed = time.monotonic()

    while True:
        due = committed + setup.commit_seconds - time.monotonic()
        if worker.wants_to_commit or due <= 0 or not connection.poll(due):
            commit()
            continue
        kind, argument, extra = connection.recv()
        if kind == "close":
            commit()
            connection.send(("closed", None))
            return
        if kind == "commit":
            commit()
        elif kind == "video":
            connection.send(("done", worker.process(argument, skip=extra)))
        else:
            connection.send(("done", worker.give_up(argument, **extra)))
            commit()  # the verdict must outlive this worker: the next video may end it too


def _alone_with_its_gpu(runtime: Runtime) -> Runtime:
    """Let this process see its GPU only, as number 0: no library that it loads can touch another."""
    if runtime.provider == "cpu":
        return runtime
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else []
    if devices and runtime.device_id >= len(devices):
        raise ValueError(f"--devices {runtime.device_id}: CUDA_VISIBLE_DEVICES={visible} leaves 0-{len(devices) - 1}")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[runtime.device_id] if devices else str(runtime.device_id)
    return replace(runtime, device_id=0)


def _die_with_parent(parent: int) -> None:
    """Have the kernel end this process with its job: kill -9 of the job leaves no worker behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
