"""One worker: videos in, finished parts of the dataset out."""

import logging
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from preprocessing.inputs import Source, local_file
from preprocessing.leases import first_with_content, holds
from preprocessing.ledger import Outcome
from preprocessing.pipeline import Pipeline, Rejected, RejectedClip
from preprocessing.video import UserVideoError
from wan_accel.data import store
from wan_accel.data.schema import clips_features

logger = logging.getLogger(__name__)
COMMIT_BYTES = 512 << 20


class LeaseLost(RuntimeError):
    """Another job took videos over while this one stood still; what it did of them must not count."""


class Worker:
    """Works on videos one after the other; their rows and outcomes count together, at `commit`.

    Args:
        pipeline: settings and networks.
        output: the dataset's folder, claimed before.
        name: unique among all workers of all jobs.
        job: whose leases cover the videos.
        scratch: folder for copies of remote videos.
    """

    def __init__(self, pipeline: Pipeline, output: Path, *, name: str, job: str, scratch: Path) -> None:
        self._pipeline, self._output, self._job, self._scratch = pipeline, output, job, scratch
        self._name = name
        self._outcomes: list[Outcome] = []

    @cached_property
    def _writer(self) -> store.PartWriter:
        """Made with the first video, when the output is claimed; parts end at commits only."""
        features = clips_features(animate=self._pipeline.settings.kind == "animate")
        return store.PartWriter(self._output, writer=self._name, features=features, part_bytes=1 << 62)

    def process(self, source: Source, *, skip: frozenset[str] = frozenset()) -> Outcome:
        """Write the rows of one video; whatever is wrong with it becomes a record in its outcome.

        Args:
            source: the video.
            skip: ids of clips that an earlier run has committed.

        Raises:
            StoreError: the disk is full.
        """
        start, num_clips = time.monotonic(), 0
        rejected: list[dict[str, Any]] = []
        try:
            with local_file(source.path, self._scratch) as path:
                first_with = partial(first_with_content, self._output, key=source.key)
                for item in self._pipeline.process(source, path, skip=skip, first_with=first_with):
                    if isinstance(item, RejectedClip):
                        rejected.append({"path": source.key, **asdict(item)})
                    else:
                        self._writer.write(item)
                        num_clips += 1
        except store.StoreError:
            raise
        except Rejected as error:
            rejected.append(record(source.key, error.reason, str(error)))
        except (UserVideoError, OSError) as error:
            rejected.append(record(source.key, "unreadable", str(error)))
        except Exception as error:  # whatever it is, it is one video's: the run goes on, --max-reject-rate ends it
            logger.warning("%s", source.key, exc_info=not isinstance(error, ValueError))
            rejected.append(record(source.key, "unusable", f"{source.path}: {type(error).__name__}: {error}"))
        outcome = Outcome(
            key=source.key, num_clips=num_clips, rejected=rejected, seconds=time.monotonic() - start, time=time.time()
        )
        self._outcomes.append(outcome)
        return outcome

    def give_up(self, key: str, *, reason: str, detail: str, seconds: float) -> Outcome:
        """Note a video that killed the worker before this one, or took too long."""
        outcome = Outcome(
            key=key, num_clips=0, rejected=[record(key, reason, detail)], seconds=seconds, time=time.time()
        )
        self._outcomes.append(outcome)
        return outcome

    @property
    def wants_to_commit(self) -> bool:
        """Say whether enough was written for a part."""
        return bool(self._outcomes) and self._writer.unfinished_bytes >= COMMIT_BYTES

    def commit(self) -> list[str]:
        """Make everything since the last commit count; returns the videos' keys.

        Raises LeaseLost, and forgets it all, where another job has taken one of the videos over.
        """
        keys = [outcome.key for outcome in self._outcomes]
        if lost := [key for key in keys if not holds(self._output, key, self._job)]:
            self.abandon()
            raise LeaseLost(f"{len(lost)} videos were taken over by another job, {lost[0]} among them")
        if keys:
            self._writer.flush(journal={"videos": [asdict(outcome) for outcome in self._outcomes]})
        self._outcomes = []
        return keys

    def abandon(self) -> None:
        """Forget everything since the last commit."""
        self._writer.abandon()
        self._outcomes = []


def record(key: str, reason: str, detail: str) -> dict[str, Any]:
    """A line of rejected.jsonl about a whole video."""
    return {"path": key, "clip_id": None, "reason": reason, "detail": detail}
