"""One run of the cache at a time on a latents folder. Torch-free."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wan_accel.data.store import StoreError, write_json

LOCK_FILE = ".cache.lock"
SOFT_LOCK_FILE = ".cache.softlock"  # another name: the first may be there, unlocked
HOLDER_FILE = ".cache_run.json"


@contextmanager
def lone_run(root: Path) -> Iterator[None]:
    """Keep a latents folder for this process; the system gives it back when the process ends, however it does.

    Raises:
        StoreError: another run has it: which, and what to do.
    """
    lock = _locked(root)
    try:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(root / HOLDER_FILE, {"host": platform.node(), "pid": os.getpid(), "started": started})
        yield
    finally:
        (root / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _locked(root: Path) -> BaseFileLock:
    """A lock of the system's; where the file system keeps none, a file that a killed run leaves behind."""
    try:
        return _acquired(root, FileLock(root / LOCK_FILE))
    except (OSError, NotImplementedError):
        return _acquired(root, SoftFileLock(root / SOFT_LOCK_FILE))


def _acquired(root: Path, lock: BaseFileLock) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"{root} is being written by another run of wan_accel.cache ({_holder(root)}): wait for it, or end it, and "
            f"start again; if there is no such process any more, remove {lock.lock_file}"
        ) from None
    return lock


def _holder(root: Path) -> str:
    try:
        holder = json.loads((root / HOLDER_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # it begins or ends at this moment
        return "it does not say where"
    return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
