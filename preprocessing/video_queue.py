"""The videos of a job: which are to do, whose turn it is, which other jobs have."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from preprocessing.inputs import Source
from preprocessing.leases import Leases
from preprocessing.ledger import Ledger, to_retry
from wan_accel.data import store


class VideoQueue:
    """Hands videos out, each to one worker of one job; those that count already are left out.

    retry: reasons (comma-separated, "" for all) whose rejected videos are worked on again; None: of none.
    """

    def __init__(self, sources: Sequence[Source], output: Path, ledger: Ledger, *, retry: str | None) -> None:
        self._ledger = ledger
        retried = to_retry(ledger, retry) if retry is not None else set()
        self._retried = {key: ledger.outcomes[key].time for key in retried}
        self._committed_clips = frozenset(store.ids(output, "clip_id")) if retried else frozenset()
        unique = {source.key: source for source in sources}
        finished = set(ledger.outcomes) - retried
        self._todo = deque(source for key, source in unique.items() if key not in finished)
        self._elsewhere: deque[Source] = deque()
        self.num_videos, self.num_todo = len(unique), len(self._todo)
        self.num_elsewhere_done = 0

    def __bool__(self) -> bool:
        """Say whether there is something that may be claimed now."""
        return bool(self._todo)

    @property
    def waits_for_others(self) -> bool:
        """Say whether other jobs have videos that may come back: a job may die."""
        return bool(self._elsewhere)

    def put_back(self, source: Source) -> None:
        """Have a video worked on again, next."""
        self._todo.appendleft(source)

    def claim(self, leases: Leases) -> Source | None:
        """Claim the next video that no living job has and that nobody has finished; None: there is none now."""
        while self._todo:
            source = self._todo.popleft()
            if not leases.claim(source.key):
                self._elsewhere.append(source)
                continue
            # It may have been committed between the last look and the claim, never after the claim.
            self._ledger.refresh()
            if not self._is_finished(source.key):
                return source
            leases.release([source.key])
            self.num_elsewhere_done += 1
        return None

    def look_elsewhere(self) -> None:
        """Look again at the videos that other jobs had: done by now, or to be claimed if the job died."""
        self._ledger.refresh()
        for _ in range(len(self._elsewhere)):
            source = self._elsewhere.popleft()
            if self._is_finished(source.key):
                self.num_elsewhere_done += 1
            else:
                self._todo.append(source)

    def clips_to_skip(self, source: Source) -> frozenset[str]:
        """Ids of clips that an earlier run committed, where a video is worked on again."""
        return self._committed_clips if source.key in self._retried else frozenset()

    def _is_finished(self, key: str) -> bool:
        outcome = self._ledger.outcomes.get(key)
        return outcome is not None and outcome.time > self._retried.get(key, -1.0)
