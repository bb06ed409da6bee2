"""What became of every video: read from the parts' sidecars, where it counts exactly when the rows do."""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_accel.data.store import StoreError, write_lines

REJECTED_FILE = "rejected.jsonl"
_SETTLED_NANOSECONDS = 60 * 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a video gave: `rejected` holds a record for the video, or for each clip that was not good enough.

    A record: path (the source's key), clip_id or None, reason (a word), detail (a sentence), quality or absent.
    seconds: how long it took; time: when it was finished, seconds since 1970.
    """

    key: str
    num_clips: int
    rejected: list[dict[str, Any]]
    seconds: float
    time: float

    @property
    def is_rejected(self) -> bool:
        """Say whether the video as a whole gave nothing, or broke off."""
        return any(record["clip_id"] is None for record in self.rejected)


class Ledger:
    """The outcomes of all committed videos; `refresh` reads the parts that are new. The latest outcome counts."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._seen: set[Path] = set()
        self._changed: dict[Path, int | None] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what was committed since, by any job."""
        for path in sorted(self._new_sidecars()):
            try:
                journal = json.loads(path.read_text()).get("journal") or {"videos": []}
                outcomes = [Outcome(**entry) for entry in journal["videos"]]
            except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
                raise StoreError(
                    f"{path} is damaged ({error}): remove it with its part, and run the command that made it again"
                ) from error
            self._seen.add(path)
            for outcome in outcomes:
                known = self.outcomes.get(outcome.key)
                if known is None or known.time <= outcome.time:
                    self.outcomes[outcome.key] = outcome

    def _new_sidecars(self) -> set[Path]:
        """List folders that changed since the last look only: a large run has ten thousands of parts."""
        sidecars: set[Path] = set()
        for folder in (self._output / "parts").glob("*"):
            changed = _mtime_now(folder)
            if self._changed.get(folder) != changed:
                sidecars |= set(folder.glob("data-*.arrow.json")) - self._seen
            # A change that is as young as this may not be the last one within a tick of the file system's clock.
            self._changed[folder] = changed if time.time_ns() - changed > _SETTLED_NANOSECONDS else None
        return sidecars

    def rejections(self) -> list[dict[str, Any]]:
        """All records of videos and clips that were turned down, in a fixed order."""
        return [record for key in sorted(self.outcomes) for record in self.outcomes[key].rejected]

    def write_rejections(self) -> None:
        """Bring rejected.jsonl up to date, at once."""
        lines = [json.dumps(record, ensure_ascii=False) for record in self.rejections()]
        if lines or (self._output / REJECTED_FILE).is_file():
            write_lines(self._output / REJECTED_FILE, lines)

    def reasons(self) -> Counter[str]:
        """How often each reason turned a video or a clip down."""
        return Counter(record["reason"] for record in self.rejections())


def _mtime_now(folder: Path) -> int:
    """When a folder changed last, nanoseconds; opened first, for which a network file system asks its server."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def to_retry(ledger: Ledger, reasons: str | None) -> set[str]:
    """Keys of videos that a record turned down; `reasons`: comma-separated words, empty for all of them.

    Raises ValueError for a reason that nothing was turned down for.
    """
    wanted = {word.strip() for word in (reasons or "").split(",") if word.strip()}
    if unknown := wanted - set(ledger.reasons()):
        raise ValueError(
            f"--retry-rejected {reasons}: nothing was rejected as {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(ledger.reasons())) or 'no rejections'}"
        )
    return {
        key
        for key, outcome in ledger.outcomes.items()
        if any(not wanted or record["reason"] in wanted for record in outcome.rejected)
    }
