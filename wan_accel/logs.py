"""Every rank's Python logging in a file of its own: output_dir/logs/rank-N.log."""

import logging
import logging.handlers
import os
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What is logged before the output folder is known to be this run's.
_EARLY = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)


def start_logging() -> None:
    """Show information on the main rank and warnings on the others; keep everything for the rank's file."""
    rank, root = int(os.environ.get("RANK", "0")), logging.getLogger()
    root.setLevel(logging.INFO)
    if not root.handlers:  # as logging.basicConfig: a program around ours shows what it wants
        shown = logging.StreamHandler()
        shown.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        shown.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(shown)
    root.addHandler(_EARLY)


def log_to_file(output_dir: Path, rank: int) -> Path:
    """Append this rank's log records, those so far included, to its file; returns the file.

    A second run in the same process moves on to its own file.
    """
    path = output_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _RankFile)]:
        root.removeHandler(old)
        old.close()
    handler = _RankFile(path)
    handler.setFormatter(logging.Formatter(_FORMAT))
    _EARLY.setTarget(handler)
    _EARLY.flush()
    _EARLY.setTarget(None)
    root.removeHandler(_EARLY)
    root.addHandler(handler)
    return path


def log_failure(error: BaseException) -> None:
    """Write an exception with its traceback to the rank's file only: Python shows it on the terminal already."""
    record = logging.LogRecord(
        "wan_accel", logging.ERROR, __file__, 0, "the run failed", None, (type(error), error, error.__traceback__)
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RankFile):
            handler.handle(record)


class _RankFile(logging.FileHandler):
    """The file of this rank."""
