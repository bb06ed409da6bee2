"""Videos claimed by jobs that share an output folder: any number may join, die or leave.

<output>/work/jobs/<job>.json    who the job is; its modification time is the job's heartbeat
<output>/work/videos.json        how many videos the latest job was given
<output>/work/leases/<hash>.<n>  claims of a video, each holding a job's name; the last one counts
<output>/work/contents/<hash>    one file a content, holding the key of the first video that has it
"""

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from wan_accel.data.store import write_json

WORK_FOLDER = "work"
VIDEOS_FILE = "videos.json"
LEASE_SECONDS = 120.0
_BEATS_PER_LEASE = 6


def new_job_name() -> str:
    """A name that no other job has, on any machine; it says where and as what it runs."""
    return f"{platform.node()}-{os.getpid()}-{uuid4().hex[:8]}"


class Leases:
    """One job's claims. A claim lasts while the job's heartbeat goes on; a dead job's videos are free again.

    A job on the same machine is dead when its process is; elsewhere, when its heartbeat is `lease_seconds` old by the
    clock of the file system, which all jobs share.
    """

    def __init__(
        self, output: Path, job: str, *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.job = job
        self._jobs, self._leases = output / WORK_FOLDER / "jobs", output / WORK_FOLDER / "leases"
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._leases.mkdir(parents=True, exist_ok=True)
        self._lease_seconds = lease_seconds
        self._file = self._jobs / f"{self.job}.json"
        write_json(self._file, _identity(os.getpid()))
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._stop.wait(self._lease_seconds / _BEATS_PER_LEASE):
            with suppress(OSError):  # an unreachable file system may come back; if not, the lease ends
                self._file.touch()

    def claim(self, key: str) -> bool:
        """Claim a video; False where another living job has it."""
        chain = _chain(self._leases, key)
        if chain and chain[-1].owner == self.job:
            return True
        if chain and self._is_held(chain[-1]):
            return False
        try:
            # Exclusive: of several jobs that found the last lease free, one makes the next. Nothing is taken away, so
            # that a job that read an old state, and stood still meanwhile, cannot end a lease that it never saw.
            descriptor = os.open(_lease_path(self._leases, key, len(chain)), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self.job)
        return True

    def _is_held(self, lease: "_Lease") -> bool:
        # An empty file is a claim at this moment, or one that was killed between two system calls.
        return self.is_alive(lease.owner) or (not lease.owner and self._age(lease.path) < self._lease_seconds)

    def holds(self, key: str) -> bool:
        """Say whether a claim is still this job's: it is lost after a standstill longer than the lease."""
        return holds(self._leases.parents[1], key, self.job)

    def release(self, keys: Iterable[str]) -> None:
        """Give claims of finished videos back: whoever claims them next finds them done."""
        for key in keys:
            chain = _chain(self._leases, key)
            if chain and chain[-1].owner == self.job:
                for lease in chain:  # the oldest first: the last one may not count again
                    lease.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the heartbeat; claims that are left are free for others."""
        self._stop.set()
        self._heart.join()
        self._file.unlink(missing_ok=True)

    def is_alive(self, job: str) -> bool:
        """Say whether a job still works."""
        self._file.touch()
        return _is_alive(self._jobs / f"{job}.json", now=self._file.stat().st_mtime, lease_seconds=self._lease_seconds)

    def bury(self) -> list[str]:
        """Forget the jobs that died, and return them."""
        dead = [path.stem for path in sorted(self._jobs.glob("*.json")) if not self.is_alive(path.stem)]
        for job in dead:
            (self._jobs / f"{job}.json").unlink(missing_ok=True)
        return dead

    def _age(self, path: Path) -> float:
        self._file.touch()
        with suppress(FileNotFoundError):
            return self._file.stat().st_mtime - path.stat().st_mtime
        return 0.0


def first_with_content(output: Path, content: str, key: str) -> str:
    """Note that a video has this content, and return the key of the first video that did: `key` itself, or a copy's.

    The note stays: of copies that many workers meet at once, one is worked on, also after a kill.
    """
    name = _lease_name(content)
    path = output / WORK_FOLDER / "contents" / name[:2] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{name}.{uuid4().hex[:8]}")
    temporary.write_text(key)
    try:
        os.link(temporary, path)  # with its text at once, unlike open and write
    except FileExistsError:
        return path.read_text()
    finally:
        temporary.unlink()
    return key


def holds(output: Path, key: str, job: str) -> bool:
    """Say whether `job` has the claim of a video; worker processes ask before they commit."""
    chain = _chain(output / WORK_FOLDER / "leases", key)
    return bool(chain) and chain[-1].owner == job


def living_jobs(output: Path, *, lease_seconds: float = LEASE_SECONDS) -> list[str]:
    """Names of the jobs that work on an output folder; by this machine's clock where they run on others."""
    jobs = sorted((output / WORK_FOLDER / "jobs").glob("*.json"))
    return [path.stem for path in jobs if _is_alive(path, now=time.time(), lease_seconds=lease_seconds)]


def _is_alive(path: Path, *, now: float, lease_seconds: float) -> bool:
    try:
        identity = json.loads(path.read_text())
        if _is_here(identity):
            return _is_running(identity)
        return now - path.stat().st_mtime < lease_seconds
    except (FileNotFoundError, json.JSONDecodeError):
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lease:
    path: Path
    owner: str


def _chain(folder: Path, key: str) -> list[_Lease]:
    """All claims of a video, the one that counts last."""
    chain: list[_Lease] = []
    with suppress(FileNotFoundError):
        while True:
            path = _lease_path(folder, key, len(chain))
            chain.append(_Lease(path=path, owner=path.read_text()))
    return chain


def _lease_path(folder: Path, key: str, number: int) -> Path:
    return folder / f"{_lease_name(key)}.{number}"


def _lease_name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _identity(pid: int) -> dict[str, object]:
    """A process, also told from a later one with its number, or one in another container of this machine."""
    return {
        "host": platform.node(), "boot": _boot_id(), "namespace": _namespace(), "pid": pid,
        "process_started": psutil.Process(pid).create_time(),
    }  # fmt: skip


def _is_here(identity: dict[str, object]) -> bool:
    here = (platform.node(), _boot_id(), _namespace())
    return (identity["host"], identity["boot"], identity["namespace"]) == here


def _is_running(identity: dict[str, object]) -> bool:
    try:
        process = psutil.Process(int(str(identity["pid"])))
        return process.create_time() == identity["process_started"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
