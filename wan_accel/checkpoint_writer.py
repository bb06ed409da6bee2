"""Writes checkpoints beside training: what changes is copied to host memory, a thread writes it, one at a time.

A checkpoint is written into checkpoint-<step>.tmp, every file hashed and flushed to the disk, and renamed when all
ranks have finished. The thread's collectives run on a gloo group of its own: on training's group they would mix
with those of the step.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from wan_accel.checkpoint import Manifest, commit
from wan_accel.file_sums import FileSum, SummingFileSystem, sum_file

logger = logging.getLogger("wan_accel")
T = TypeVar("T")
# How long a rank waits for the slowest one's files; a rank that dies is noticed at once.
_TIMEOUT = timedelta(hours=4)
_SETTLE_SECONDS = 600


class SaveError(RuntimeError):
    """A checkpoint could not be written. Those before it are whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A checkpoint to be written.

    folder: exists, ends in `.tmp`, holds the small files already.
    manifest: without its files.
    parts: folder inside -> state dict for torch.distributed.checkpoint.
    keep: number of complete checkpoints that stay, None for all.
    sharded: every rank writes its part; otherwise all hold the same and rank 0 writes it.
    """

    folder: Path
    manifest: Manifest
    parts: Mapping[str, Any]
    keep: int | None
    sharded: bool


class CheckpointWriter:
    """One for a run. Collective: it makes a process group, and every method is called by all ranks alike."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._rank, self._world_size = 0, 1
        if dist.is_initialized():
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None

    def write(self, job: Job, *, beside: bool) -> None:
        """Write a checkpoint, beside training or before this returns. The one before has to be waited for first.

        Raises:
            SaveError: it was written before this returned, and failed.
        """
        assert self._thread is None
        if not beside:
            self._run(job)
            self.wait()
            return
        job = dataclasses.replace(job, parts=self._staged(job))
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            SaveError: on all ranks; what happened on which.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Give a checkpoint that is being written time to be complete, where a run ends with another error."""
        if self._thread is not None:
            self._thread.join(_SETTLE_SECONDS)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once. Ranks may see it at different moments."""
        return self._error is not None

    def _staged(self, job: Job) -> dict[str, Any]:
        """Copies in host memory of what this rank writes."""
        return {name: to_host(part) for name, part in job.parts.items()} if job.sharded or self._rank == 0 else {}

    def _run(self, job: Job) -> None:
        started = time.perf_counter()
        name = job.folder.name.removesuffix(".tmp")
        try:
            sums = self._write_files(job)
            self._together(lambda: self._commit(job, sums))
        except SaveError as error:
            self._error = SaveError(
                f"{name} could not be written ({error}). Checkpoints before it are whole: mend it and run the same "
                "command again, which goes on from the newest"
            )
        else:
            size, seconds = sum(one.size for one in sums.values()), time.perf_counter() - started
            logger.info("%s is complete: %.2f GiB written in %.1f s", name, size / 2**30, seconds)

    def _write_files(self, job: Job) -> dict[str, FileSum]:
        """Write the parts, and hash what others have written into the folder. Returns the sums of all files."""
        known: dict[str, FileSum] = {}
        for mine in self._together(lambda: self._write_parts(job)):
            known |= mine
        files = self._together(lambda: _files_in(job.folder) if self._rank == 0 else [])[0]
        rest = [name for name in files if name not in known]
        share = rest[self._rank :: self._world_size]
        for mine in self._together(lambda: {name: sum_file(job.folder / name) for name in share}):
            known |= mine
        return {name: known[name] for name in sorted(known)}

    def _write_parts(self, job: Job) -> dict[str, FileSum]:
        sums: dict[Path, FileSum] = {}
        is_alone = self._group is None or not job.sharded
        for name, state in job.parts.items() if job.sharded or self._rank == 0 else ():
            writer = dcp.FileSystemWriter(job.folder / name)
            writer.fs = SummingFileSystem()
            dcp.save(state, storage_writer=writer, process_group=None if is_alone else self._group, no_dist=is_alone)
            sums |= writer.fs.sums
        return {str(path.relative_to(job.folder)): one for path, one in sums.items()}

    def _commit(self, job: Job, sums: Mapping[str, FileSum]) -> None:
        if self._rank == 0:
            files = {name: (one.size, one.xxh3_128) for name, one in sums.items()}
            commit(job.folder, dataclasses.replace(job.manifest, files=files), keep=job.keep)

    def _together(self, do: Callable[[], T]) -> list[T]:
        """What every rank makes of `do`, by rank.

        Raises:
            SaveError: on all ranks, what one of them raised.
        """
        try:
            outcome: tuple[T | None, str | None] = (do(), None)
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception, and holds that of each rank
            outcome = (None, self._describe(error))
        outcomes = [outcome]
        if self._group is not None:
            outcomes = [outcome] * self._world_size
            try:
                dist.all_gather_object(outcomes, outcome, group=self._group)
            except RuntimeError as error:
                raise SaveError(f"another rank is gone: {_first_line(error)}") from error
        problems = dict.fromkeys(problem for _, problem in outcomes if problem is not None)
        if problems:
            raise SaveError("; ".join(problems))
        return [made for made, _ in outcomes]  # type: ignore[misc]

    def _describe(self, error: BaseException) -> str:
        failures = {self._rank: error}
        if isinstance(error, dcp.CheckpointException):  # the same on every rank
            failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        rank, failure = next(iter(failures.items()))
        more = f" (and {len(failures) - 1} other ranks)" if len(failures) > 1 else ""
        return f"rank {rank}: {type(failure).__name__}: {_first_line(failure)}{more}"


def to_host(state: Any) -> Any:
    """A copy in host memory of a nest of dictionaries, lists and tensors (DTensors stay ones)."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_host(value) for value in state)
    return state


def can_be_copied(state: Any) -> bool:
    """Whether `to_host` copies all of it: of torchao's quantised tensors parts on the CPU stay those of training."""
    if isinstance(state, Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return type(local) in (Tensor, nn.Parameter)
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return all(can_be_copied(value) for value in values)


def host_bytes(state: Any) -> int:
    """What `to_host` allocates."""
    if isinstance(state, Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return local.numel() * local.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(host_bytes(value) for value in values)


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
