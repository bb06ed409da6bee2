"""The machine around the GPUs: compiler, shared memory, open files, video library, the hub's cache. Torch-free."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from wan_accel.disk import free_bytes
from wan_accel.doctor_finding import Finding, Job, Level
from wan_accel.parallel.names import is_zero

GIB, MIB = 2**30, 2**20
SHM = Path("/dev/shm")
# torch's DataLoader keeps so many batches of each worker ready.
PREFETCH = 2
# A sample in shared memory, generously: cached conditions of a clip, or its frames where training encodes them.
SAMPLE_MIB = {"cached": 32, "frames": 512}
# File descriptors: a tensor on its way from a worker holds one, so do files of weights and datasets.
FEW_FILES, ENOUGH_FILES = 1024, 4096


def check_memory(job: Job) -> list[Finding]:
    memory = psutil.virtual_memory()
    value = f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free, {os.cpu_count()} cores"
    return [Finding(name="host", level="ok", value=value)]


def check_shared_memory(job: Job) -> list[Finding]:
    """Workers hand batches over in /dev/shm, of which a container has 64 MiB unless it is told otherwise."""
    if not SHM.is_dir():
        return []
    return [shared_memory_finding(shutil.disk_usage(SHM).free, shared_bytes(job, num_processes=_local_processes()))]


def shared_bytes(job: Job, *, num_processes: int) -> int:
    """Shared memory that the batches of all workers of a machine take."""
    live = job.recipe is not None and "video" in job.recipe.data.on_the_fly
    samples = (job.recipe.data.micro_batch.samples if job.recipe is not None else None) or 1
    sample_mib = SAMPLE_MIB["frames" if live else "cached"]
    return num_processes * job.num_workers * PREFETCH * samples * sample_mib * MIB


def shared_memory_finding(free_bytes: int, needed_bytes: int) -> Finding:
    value = f"{free_bytes / GIB:.1f} GiB free, workers may take {needed_bytes / GIB:.1f} GiB"
    if free_bytes >= needed_bytes:
        return Finding(name="/dev/shm", level="ok", value=value)
    advice = (
        "workers may die with a bus error: start the container with --shm-size or --ipc=host, or lower "
        "training.dataloader_num_workers"
    )
    return Finding(name="/dev/shm", level="warning", value=value, advice=advice)


def _local_processes() -> int:
    """Of a launch, those on this machine; otherwise one a GPU."""
    import torch

    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())


def check_open_files(job: Job) -> list[Finding]:
    return [open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))]


def open_files_finding(soft: int, hard: int) -> Finding:
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        value = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        return Finding(name="ulimit -n", level="ok", value=value)
    level: Level = "warning" if soft < FEW_FILES else "note"
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    advice = f"on `Too many open files`: ulimit -n {ENOUGH_FILES} before the launch (this user may set {most})"
    return Finding(name="ulimit -n", level=level, value=str(soft), advice=advice)


def check_compiler(job: Job) -> list[Finding]:
    """DeepSpeed builds an extension where the CPU communicates or updates weights; it needs g++ and ninja."""
    own = Path(sys.executable).parent / "ninja"
    ninjas = {str(path): _version_of(path) for path in (shutil.which("ninja"), own) if path and Path(path).is_file()}
    return [compiler_finding(shutil.which("g++"), ninjas, engine=job.engine)]


def compiler_finding(gxx: str | None, ninjas: Mapping[str, str], *, engine: str | None) -> Finding:
    """Judge the path of g++ and the versions of ninja by path, the one that a build runs first."""
    missing = [name for name, found in (("g++", gxx), ("ninja", ninjas)) if not found]
    if missing:
        level: Level = "warning" if is_zero(engine) else "note"
        advice = "ZeRO on the CPU, or offloading to it, needs both: apt-get install g++, pip install ninja"
        return Finding(name="build tools", level=level, value=f"no {' and no '.join(missing)}", advice=advice)
    value = f"g++, ninja {next(iter(ninjas.values()))}"
    if len(set(ninjas.values())) == 1:
        return Finding(name="build tools", level="ok", value=value)
    others = ", ".join(f"{path} is {version}" for path, version in ninjas.items())
    advice = "DeepSpeed's extension is built again when the other one runs: put the environment's bin first in PATH"
    return Finding(name="build tools", level="warning", value=others, advice=advice)


def _version_of(path: str | Path) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or f"broken ({done.stderr.strip()[:80]})"


def check_video(job: Job) -> list[Finding]:
    """Sample videos are H.264; PyAV brings FFmpeg with it."""
    import av

    value = f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"
    if "libx264" in av.codecs_available:
        return [Finding(name="video", level="ok", value=value)]
    return [Finding(
        name="video", level="problem", value=f"{value} without libx264",
        advice="sample videos cannot be written: install av from PyPI (pip install --force-reinstall av)",
    )]  # fmt: skip


def check_hub(job: Job) -> list[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    mode = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    return [Finding(name="hub cache", level="ok", value=f"{folder}, {free_bytes(folder) / GIB:.0f} GiB free{mode}")]
