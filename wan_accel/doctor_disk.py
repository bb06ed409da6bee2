"""The disk of the checkpoint folder: its kind, room, and speed. Torch-free."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from wan_accel.doctor_finding import Finding, Job

GIB, MIB = 2**30, 2**20
# Under these a warning: room for a few checkpoints of a LoRA; a disk on which a save of full training takes an hour.
LITTLE_ROOM_GIB, SLOW_MB = 10, 100
# A checkpoint of full training of a 14B model: weights and AdamW's two moments in fp32, 12 bytes a parameter.
FULL_CHECKPOINT_MB = 14.3e9 * 12 / 1e6
KINDS = {
    "tmpfs": ("warning", "this is memory, and gone after a restart: choose a folder on a disk"),
    "overlay": ("warning", "this is the container's own layer, and gone with it: mount a volume"),
    "nfs": ("note", "shared with other machines, and its speed with their users"),
    "nfs4": ("note", "shared with other machines, and its speed with their users"),
    "lustre": ("note", "stripe large files over servers: lfs setstripe -c -1 FOLDER before the first checkpoint"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskSpeed:
    """MB/s of one process that writes a file through to the disk and reads it back from there."""

    write: float
    read: float


def check_disk(job: Job) -> list[Finding]:
    """Kind, room and speed of the nearest folder that exists: output_dir is not made for this."""
    if job.output_dir is None:
        return [Finding(
            name="disk", level="note", value="not measured", advice="name a recipe, or --output_dir FOLDER"
        )]  # fmt: skip
    wanted = job.output_dir.absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    findings = [room_finding(folder, filesystem_of(folder), free)]
    if free < 2 * job.disk_mib * MIB:
        return [*findings, Finding(name="disk speed", level="note", value="not measured: too little room")]
    try:
        return [*findings, speed_finding(measure_disk(folder, job.disk_mib), job.disk_mib)]
    except OSError as error:  # no permission, a quota, a server that is away
        advice = "checkpoints cannot be written there: mend it, or choose another folder"
        return [*findings, Finding(name="disk speed", level="problem", value=str(error), advice=advice)]


def filesystem_of(folder: Path) -> str:
    """Its type as the kernel names it, of the innermost mount; `unknown` if that is not shown."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (folder.resolve(), *folder.resolve().parents) if path in mounts), "unknown")


def room_finding(folder: Path, kind: str, free_bytes: int) -> Finding:
    value = f"{folder} ({kind}), {free_bytes / GIB:.0f} GiB free"
    if free_bytes < LITTLE_ROOM_GIB * GIB:
        size = f"{FULL_CHECKPOINT_MB / 1000:.0f} GB"
        advice = f"a full checkpoint of a 14B model has {size}: free some, or choose another"
        return Finding(name="disk", level="warning", value=value, advice=advice)
    level, advice = KINDS.get(kind, ("ok", ""))
    return Finding(name="disk", level=level, value=value, advice=advice)  # type: ignore[arg-type]


def speed_finding(speed: DiskSpeed, size_mib: int) -> Finding:
    value = f"write {speed.write:.0f} MB/s, read {speed.read:.0f} MB/s (one process, {size_mib} MiB)"
    if speed.write >= SLOW_MB:
        return Finding(name="disk speed", level="ok", value=value)
    minutes = FULL_CHECKPOINT_MB / speed.write / 60
    advice = f"a full checkpoint of a 14B model takes {minutes:.0f} minutes with one writer: choose a faster disk"
    return Finding(name="disk speed", level="warning", value=value, advice=advice)


def measure_disk(folder: Path, size_mib: int) -> DiskSpeed:
    """Write and read a file of random bytes, which nothing on the way can compress, and remove it."""
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".wan-accel-doctor-") as file:
        descriptor, start = file.fileno(), time.perf_counter()
        for _ in range(size_mib):
            os.write(descriptor, block)
        os.fsync(descriptor)
        written = time.perf_counter()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from the page cache
        os.lseek(descriptor, 0, os.SEEK_SET)
        begun = time.perf_counter()
        while os.read(descriptor, MIB):
            pass
        read = time.perf_counter()
    megabytes = size_mib * MIB / 1e6
    return DiskSpeed(write=megabytes / (written - start), read=megabytes / (read - begun))
