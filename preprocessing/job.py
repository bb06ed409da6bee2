"""A job: claims videos, hands them to its worker processes, survives what happens to them."""

import logging
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from preprocessing.inputs import Source
from preprocessing.leases import LEASE_SECONDS, VIDEOS_FILE, WORK_FOLDER, Leases, new_job_name
from preprocessing.ledger import Ledger, Outcome
from preprocessing.processes import WorkerProcess, WorkerSetup, start_worker
from preprocessing.settings import ModelFiles, Runtime, Settings
from preprocessing.video_queue import VideoQueue
from wan_accel.data import store
from wan_accel.data.schema import clips_features

logger = logging.getLogger(__name__)
_MOST_CRASHES = 2  # of one video; a worker may die for reasons that are not the video's, once
_MOST_FALSE_STARTS = 2
_LEAST_VIDEOS = 20  # before a share of rejections says anything
_WAIT_SECONDS = 1.0
_REPORT_SECONDS = 60.0


class RunStopped(RuntimeError):
    """The run cannot go on: what happened, and what to do. Everything committed is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """How a job works; none of it changes the clips.

    runtimes: one for each worker process. timeout_seconds: for one video. max_reject_rate: share of rejected videos
    that stops the run. retry_rejected: reasons (comma-separated, "" for all) whose videos are worked on again.
    commit_seconds: how much work a kill may cost. lease_seconds: see `Leases`.
    """

    runtimes: Sequence[Runtime] = (Runtime(),)
    timeout_seconds: float | None = None
    max_reject_rate: float | None = None
    retry_rejected: str | None = None
    commit_seconds: float = 120.0
    lease_seconds: float = LEASE_SECONDS
    scratch: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a job did: videos it had to do, clips it made; and over all jobs so far: videos finished and rejected."""

    todo: int
    clips: int
    finished: int
    rejected: int
    clips_rejected: int


def run(
    settings: Settings,
    models: ModelFiles | None,
    sources: Sequence[Source],
    output: Path,
    *,
    described: dict[str, Any],
    options: JobOptions = JobOptions(),
) -> Summary:
    """Turn videos into clips with worker processes; go on where earlier runs stopped, share with running ones.

    Args:
        settings: what clips are made.
        models: the networks' files.
        sources: the videos; those that count already are skipped.
        output: the dataset's folder.
        described: what `describe` says of settings and files: compared with what the folder was made with.
        options: how to work.

    Raises:
        ValueError: a network's file or the character's picture cannot be used.
        StoreError: the folder belongs to another run.
        RunStopped: too many videos are rejected, workers cannot work any more, or the disk is full.
        KeyboardInterrupt: SIGINT or SIGTERM; what was finished is committed.
    """
    if (output / store.RUN_FILE).is_file():  # before networks are opened
        store.claim_output(output, schema=str(described["schema"]), settings=described)
    return _Job(settings, models, sources, output, described, options).run()


class _Job:
    def __init__(
        self,
        settings: Settings,
        models: ModelFiles | None,
        sources: Sequence[Source],
        output: Path,
        described: dict[str, Any],
        options: JobOptions,
    ) -> None:
        self.output, self.described, self.options = output, described, options
        self.ledger = Ledger(output)
        self.queue = VideoQueue(sources, output, self.ledger, retry=options.retry_rejected)
        self.name = new_job_name()
        self.leases: Leases | None = None
        self.scratch = scratch_folder(options.scratch, self.name)
        self.setup = WorkerSetup(
            settings=settings, models=models, runtime=options.runtimes[0], output=output, name="", job=self.name,
            scratch=self.scratch, commit_seconds=options.commit_seconds, described=described,
        )  # fmt: skip
        self.features = clips_features(animate=settings.kind == "animate")
        self.workers: list[WorkerProcess] = []
        self.num_started = self.num_false_starts = 0
        self.crashes: Counter[str] = Counter()
        self.doomed: deque[tuple[Source, dict[str, Any]]] = deque()
        self.num_done = self.num_rejected = self.num_clips = 0
        self.last_report = time.monotonic()
        self.bar: Any = None

    def run(self) -> Summary:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            if self.queue:
                self._open()
                with tqdm(total=self.queue.num_todo, desc="videos", unit="video", disable=None) as self.bar:
                    self._work()
        except BaseException:
            self._stop()
            raise
        finally:
            for worker in self.workers:
                worker.kill()
            if self.leases is not None:
                self.leases.close()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.ledger.refresh()
            if self.ledger.outcomes:
                store.refresh_state(self.output, self.features)
                self.ledger.write_rejections()
            signal.signal(signal.SIGTERM, previous)
        return self._summary()

    def _open(self) -> None:
        """Start the workers; the output is claimed when one can work, so that a bad network leaves no folder behind."""
        for runtime in self.options.runtimes[: self.queue.num_todo]:
            self._start(runtime)
        while not any(worker.is_ready for worker in self.workers):
            for connection in wait([w.connection for w in self.workers]):
                self._listen(next(w for w in self.workers if w.connection is connection))
        store.claim_output(self.output, schema=str(self.described["schema"]), settings=self.described)
        self.leases = Leases(self.output, self.name, lease_seconds=self.options.lease_seconds)
        store.write_json(self.output / WORK_FOLDER / VIDEOS_FILE, {"num_videos": self.queue.num_videos})
        self.scratch.mkdir(parents=True)
        dead = self.leases.bury()
        for job in dead:
            shutil.rmtree(scratch_folder(self.options.scratch, job), ignore_errors=True)
        writers = [path.name for path in (self.output / "parts").glob("*")] if dead else []
        store.remove_unfinished(self.output, [w for w in writers if any(w.startswith(f"{job}-") for job in dead)])

    def _work(self) -> None:
        while self._feed():
            ready = wait([w.connection for w in self.workers], _WAIT_SECONDS)  # a dead worker's is ready: at its end
            for worker in [w for w in self.workers if w.connection in ready]:
                self._listen(worker)
            self._check_time()
            self._report()
        self._stop()

    def _start(self, runtime: Runtime) -> None:
        name = f"{self.name}-{self.num_started}"
        self.num_started += 1
        self.workers.append(start_worker(replace(self.setup, runtime=runtime, name=name)))

    def _feed(self) -> bool:
        """Give idle workers something to do; False when everything is done."""
        idle = [w for w in self.workers if w.is_ready and w.current is None]
        for worker in idle:
            if self.doomed:
                doomed, record = self.doomed.popleft()
                worker.current, worker.started = doomed, time.monotonic()
                worker.connection.send(("give_up", doomed.key, record))
            elif (source := self._claim()) is not None:
                worker.send(source, self.queue.clips_to_skip(source))
        busy = any(w.current is not None or not w.is_ready for w in self.workers)
        if busy or self.queue or self.doomed:
            return True
        if any(w.uncommitted for w in self.workers):
            for worker in self.workers:
                if worker.uncommitted:
                    worker.connection.send(("commit", None, None))
            return True
        return self._others_work()

    def _claim(self) -> Source | None:
        assert self.leases is not None
        before = self.queue.num_elsewhere_done
        source = self.queue.claim(self.leases)
        self.bar.update(self.queue.num_elsewhere_done - before)
        return source

    def _others_work(self) -> bool:
        """Wait for other jobs; False when they have nothing of this job's videos."""
        if not self.queue.waits_for_others:
            return False
        time.sleep(_WAIT_SECONDS)
        before = self.queue.num_elsewhere_done
        self.queue.look_elsewhere()
        self.bar.update(self.queue.num_elsewhere_done - before)
        return bool(self.queue)

    def _listen(self, worker: WorkerProcess) -> None:
        try:
            while worker.connection.poll():
                kind, content = worker.connection.recv()
                self._take(worker, kind, content)
        except (EOFError, OSError):
            self._bury(worker)

    def _take(self, worker: WorkerProcess, kind: str, content: Any) -> None:
        if kind == "ready":
            worker.is_ready, self.num_false_starts = True, 0
        elif kind == "done":
            if worker.current is not None:
                worker.uncommitted.append((worker.current, content))
            worker.current = None
            self._count(content)
        elif kind == "committed" and self.leases is not None:
            self.leases.release(content)
            worker.uncommitted = [done for done in worker.uncommitted if done[0].key not in set(content)]
        elif kind == "lost":
            logger.warning("%s; they are worked on again where they are free", content)
            self._put_back(worker)
        elif kind == "failed" and self.leases is None:
            raise ValueError(content)  # nothing was begun: the input is at fault
        elif kind == "failed":
            raise RunStopped(content)

    def _count(self, outcome: Outcome) -> None:
        self.num_done += 1
        self.num_clips += outcome.num_clips
        self.num_rejected += outcome.is_rejected
        self.bar.update(1)
        self.bar.set_postfix(clips=self.num_clips, rejected=self.num_rejected)
        for record in outcome.rejected:
            with tqdm.external_write_mode():
                logger.info("%s: %s", record["reason"], record["detail"])
        rate, limit = self.num_rejected / self.num_done, self.options.max_reject_rate
        if limit is not None and self.num_done >= _LEAST_VIDEOS and rate > limit:
            raise RunStopped(
                f"{self.num_rejected} of {self.num_done} videos were rejected, more than --max-reject-rate {limit:g}; "
                f"the last: {outcome.rejected[-1]['detail'] if outcome.rejected else 'none'}. See rejected.jsonl; what "
                "was finished is kept"
            )

    def _bury(self, worker: WorkerProcess, *, reason: str = "crashed") -> None:
        """A worker died: start another; give the video that it died of one more try."""
        self.workers.remove(worker)
        worker.process.join()
        code = worker.process.exitcode
        worker.connection.close()
        if not worker.is_ready:
            self.num_false_starts += 1
            if self.num_false_starts > _MOST_FALSE_STARTS:
                raise RunStopped(f"workers end with code {code} while they open their networks: see the log above")
        self._put_back(worker)
        store.remove_unfinished(self.output, [worker.setup.name])
        if worker.current is not None:
            self._blame(worker.current, reason, code, time.monotonic() - worker.started)
        self._start(worker.setup.runtime)

    def _blame(self, source: Source, reason: str, code: int | None, seconds: float) -> None:
        self.crashes[source.key] += 1
        if reason == "crashed" and self.crashes[source.key] < _MOST_CRASHES:
            logger.warning("%s: its worker ended with code %s; tried once more", source.key, code)
            self.queue.put_back(source)
            return
        detail = f"{source.path}: its worker ended with code {code}, {_MOST_CRASHES} times"
        if reason == "timeout":
            detail = f"{source.path}: not finished after {seconds:.0f} s; raise --timeout-seconds"
        self.doomed.append((source, {"reason": reason, "detail": detail, "seconds": seconds}))

    def _put_back(self, worker: WorkerProcess) -> None:
        """What a worker had finished but not committed is to do again."""
        for source, outcome in worker.uncommitted:
            self.num_done -= 1
            self.num_clips -= outcome.num_clips
            self.num_rejected -= outcome.is_rejected
            self.bar.update(-1)
            self.queue.put_back(source)
        worker.uncommitted = []

    def _check_time(self) -> None:
        limit = self.options.timeout_seconds
        for worker in list(self.workers):
            if limit is not None and worker.current is not None and time.monotonic() - worker.started > limit:
                worker.process.kill()
                self._bury(worker, reason="timeout")

    def _report(self) -> None:
        """Keep rejected.jsonl up to date while the run goes on."""
        if time.monotonic() - self.last_report > _REPORT_SECONDS:
            self.last_report = time.monotonic()
            self.ledger.refresh()
            self.ledger.write_rejections()

    def _stop(self) -> None:
        """Let idle workers commit what they have; busy ones lose what they did not commit."""
        for worker in self.workers:
            if worker.is_ready and worker.current is None:
                with suppress(OSError):
                    worker.connection.send(("close", None, None))
        for worker in self.workers:
            if worker.is_ready and worker.current is None:
                with suppress(OSError, EOFError):
                    while (message := worker.connection.recv())[0] != "closed":
                        if message[0] == "committed" and self.leases is not None:
                            self.leases.release(message[1])
                worker.process.join()

    def _summary(self) -> Summary:
        outcomes = self.ledger.outcomes.values()
        return Summary(
            todo=self.queue.num_todo,
            clips=self.num_clips,
            finished=sum(not o.is_rejected for o in outcomes),
            rejected=sum(o.is_rejected for o in outcomes),
            clips_rejected=sum(len(o.rejected) - o.is_rejected for o in outcomes),
        )


def scratch_folder(parent: Path | None, job: str) -> Path:
    """Where a job keeps copies of remote videos; the next job on this machine clears up after one that was killed."""
    return (parent or Path(tempfile.gettempdir())) / f"wan-preprocess-{job}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
