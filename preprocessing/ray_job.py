"""The same work on a Ray cluster: Ray Data hands videos to actors, each with its own networks and its own parts."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.inputs import Source
from preprocessing.job import JobOptions, RunStopped, Summary
from preprocessing.leases import Leases, new_job_name
from preprocessing.ledger import Ledger, to_retry
from preprocessing.settings import ModelFiles, Runtime, Settings
from wan_accel.data import store
from wan_accel.data.schema import clips_features

_VIDEOS_PER_COMMIT = 8
_LOCAL = "local"


def run_on_ray(
    settings: Settings,
    models: ModelFiles | None,
    sources: Sequence[Source],
    output: Path,
    *,
    described: dict[str, Any],
    options: JobOptions,
    address: str,
) -> Summary:
    """Do what `job.run` does with Ray Data actors; `output` and the networks' files lie where every node sees them.

    One actor for each of options.runtimes, with a GPU of its own unless the provider is `cpu`. An actor that dies is
    started again by Ray, and its uncommitted videos are worked on again. `address` is a cluster's, or `local`.

    Raises what `job.run` raises, and ValueError for what it has and Ray has not: --timeout-seconds.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'wan-accel[ray]'") from None
    if options.timeout_seconds is not None:
        raise ValueError("--timeout-seconds is not available with --ray: leave it out, or run without --ray")
    store.claim_output(output, schema=str(described["schema"]), settings=described)
    ledger = Ledger(output)
    retried = to_retry(ledger, options.retry_rejected) if options.retry_rejected is not None else set()
    unique = {source.key: source for source in sources}
    todo = [s for key, s in unique.items() if key not in ledger.outcomes or key in retried]
    if todo:
        num_workers = len(options.runtimes)
        local = {"num_cpus": max(num_workers, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(**(local if address == _LOCAL else {"address": address}), ignore_reinit_error=True)
        try:
            _work(settings, models, todo, output, described, options, frozenset(retried))
        finally:
            ray.shutdown()
    ledger.refresh()
    store.refresh_state(output, clips_features(animate=settings.kind == "animate"))
    ledger.write_rejections()
    done = {s.key for s in todo}
    outcomes = ledger.outcomes.values()
    return Summary(
        todo=len(todo),
        clips=sum(o.num_clips for o in outcomes if o.key in done),
        finished=sum(not o.is_rejected for o in outcomes),
        rejected=sum(o.is_rejected for o in outcomes),
        clips_rejected=sum(len(o.rejected) - o.is_rejected for o in outcomes),
    )


def _work(
    settings: Settings,
    models: ModelFiles | None,
    todo: list[Source],
    output: Path,
    described: dict[str, Any],
    options: JobOptions,
    retried: frozenset[str],
) -> None:
    import ray

    runtime = options.runtimes[0]
    num_workers = min(len(options.runtimes), len(todo))
    blocks = max(num_workers, -(-len(todo) // _VIDEOS_PER_COMMIT))
    dataset = ray.data.from_items([asdict(source) for source in todo], override_num_blocks=min(blocks, len(todo)))
    arguments = {
        "settings": settings, "models": models, "runtime": runtime, "output": output, "described": described,
        "lease_seconds": options.lease_seconds, "scratch": options.scratch, "retried": retried,
        "started": time.time(),
    }  # fmt: skip
    results = dataset.map_batches(
        RayWorker,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_gpus=0 if runtime.provider == "cpu" else 1,
        num_cpus=1,
    )
    done = rejected = 0
    for row in results.iter_rows():
        done, rejected = done + 1, rejected + bool(row["is_rejected"])
        limit = options.max_reject_rate
        if limit is not None and done >= 20 and rejected / done > limit:
            raise RunStopped(
                f"{rejected} of {done} videos were rejected, more than --max-reject-rate {limit:g}; see rejected.jsonl"
            )


class RayWorker:
    """An actor: opens its networks once, works on a block of videos, commits them together."""

    def __init__(
        self,
        *,
        settings: Settings,
        models: ModelFiles | None,
        runtime: Runtime,
        output: Path,
        described: dict[str, Any],
        lease_seconds: float,
        scratch: Path | None,
        retried: frozenset[str],
        started: float,
    ) -> None:
        import tempfile

        from preprocessing.pipeline import Pipeline
        from preprocessing.worker import Worker

        self._output, self._retried, self._started = output, retried, started
        # Ray shows an actor its own GPU only, as number 0.
        pipeline = Pipeline(settings, models, runtime=replace(runtime, device_id=0), described=described)
        name = new_job_name()
        self._leases = Leases(output, name, lease_seconds=lease_seconds)
        self._ledger = Ledger(output)
        self._skip = frozenset(store.ids(output, "clip_id")) if retried else frozenset()
        self._scratch = tempfile.TemporaryDirectory(prefix="wan-preprocess-", dir=scratch)
        self._worker = Worker(pipeline, output, name=f"{name}-0", job=name, scratch=Path(self._scratch.name))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Work on a block; a video that another job has, or has finished, is left to it."""
        names = list(batch)
        outcomes, claimed = [], []
        for values in zip(*(batch[name] for name in names), strict=True):
            source = Source(**{name: _plain(value) for name, value in zip(names, values, strict=True)})
            if not self._leases.claim(source.key):
                continue
            claimed.append(source.key)
            self._ledger.refresh()
            known = self._ledger.outcomes.get(source.key)
            if known is not None and not (source.key in self._retried and known.time < self._started):
                continue
            outcomes.append(
                self._worker.process(source, skip=self._skip if source.key in self._retried else frozenset())
            )
        self._worker.commit()
        self._leases.release(claimed)
        return {"key": [o.key for o in outcomes], "is_rejected": [o.is_rejected for o in outcomes]}


def _plain(value: Any) -> Any:
    """A value of a Ray batch as it was given: numbers of numpy as Python's, NaN as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value
