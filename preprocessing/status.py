"""How far the jobs on an output folder are."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preprocessing.leases import VIDEOS_FILE, WORK_FOLDER, living_jobs
from preprocessing.ledger import Ledger
from wan_accel.data import store

_RATE_SECONDS = 3600.0  # the rate is that of the last hour


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Videos given, finished and rejected as a whole; clips; rejections by reason; jobs at work.

    videos_per_hour over the last hour of work, hours_left at that rate; None where nothing is known.
    """

    num_videos: int
    finished: int
    rejected: int
    clips: int
    reasons: Counter[str]
    jobs: int
    videos_per_hour: float | None
    hours_left: float | None


def read_status(output: Path, *, now: float | None = None) -> Status:
    """Read the state of an output folder; `now` in seconds since 1970.

    Raises StoreError where it is no output of `wan-preprocess`.
    """
    if not (output / store.RUN_FILE).is_file():
        raise store.StoreError(f"{output} is no dataset of wan-preprocess: give the folder that --output named")
    ledger = Ledger(output)
    outcomes = ledger.outcomes.values()
    num_videos = max([_num_videos(output), len(outcomes)])
    recent = sorted(o.time for o in outcomes if o.time > (now or time.time()) - _RATE_SECONDS)
    span = max((o.seconds for o in outcomes), default=0.0) + (recent[-1] - recent[0] if recent else 0.0)
    rate = len(recent) / span * 3600 if recent and span > 0 else None
    left = num_videos - len(outcomes)
    return Status(
        num_videos=num_videos,
        finished=sum(not o.is_rejected for o in outcomes),
        rejected=sum(o.is_rejected for o in outcomes),
        clips=sum(sidecar.rows for sidecar in store.parts(output).values()),
        reasons=ledger.reasons(),
        jobs=len(living_jobs(output)),
        videos_per_hour=rate,
        hours_left=left / rate if rate else None,
    )


def _num_videos(output: Path) -> int:
    path = output / WORK_FOLDER / VIDEOS_FILE
    return int(json.loads(path.read_text())["num_videos"]) if path.is_file() else 0


def sentence(status: Status) -> str:
    """The status in a few lines."""
    done = status.finished + status.rejected
    share = f" ({done / status.num_videos:.1%})" if status.num_videos else ""
    lines = [
        f"{done} of {status.num_videos} videos done{share}: {status.finished} finished, {status.rejected} rejected; "
        f"{status.clips} clips; {status.jobs} jobs at work",
        *(f"  rejected, {reason}: {count}" for reason, count in status.reasons.most_common()),
    ]
    if status.videos_per_hour is not None and status.hours_left is not None:
        lines.append(f"{status.videos_per_hour:.0f} videos an hour; {_hours(status.hours_left)} left at that rate")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    minutes = round(hours * 60)
    days, rest = divmod(minutes, 24 * 60)
    return f"{days} d {rest // 60} h" if days else f"{rest // 60} h {rest % 60:02} min"
