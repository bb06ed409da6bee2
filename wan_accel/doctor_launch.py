"""The doctor on every rank of a launch: each machine, and the links that training would use."""

import platform
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib import metadata

import torch
import torch.distributed as dist
from accelerate import PartialState

from wan_accel.doctor import examine
from wan_accel.doctor_finding import Finding, Job
from wan_accel.doctor_gpu import DRIVER
from wan_accel.doctor_links import SIZE_MIB, collective_speeds, link_speeds, mesh_axes, product_tflops
from wan_accel.doctor_packages import TESTED
from wan_accel.doctor_ranks import RankReport, compare
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.replicas import launched_replicas
from wan_accel.recipe.check import check

# A rank that does not answer ends the launch after this.
TIMEOUT = timedelta(minutes=5)


def examine_ranks(job: Job) -> list[Finding]:
    """Each machine, and what lies between the ranks of a launch. Collective; the same list on all ranks.

    Raises:
        ValueError: one process only, or a recipe with problems on this layout.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    if state.num_processes == 1:
        raise ValueError("one process has no links to measure: launch several, or use wan-accel doctor")
    problems = check(job.recipe, world_size=state.num_processes, engine=job.engine) if job.recipe is not None else []
    if problems:
        raise ValueError("\n".join([f"{len(problems)} problems in the recipe:", *problems]))
    dims = ParallelDims(
        world_size=state.num_processes,
        ulysses=job.recipe.parallel.ulysses if job.recipe is not None else 1,
        dp_replicate=launched_replicas(),
    )
    dims.validate(num_heads=dims.ulysses)  # `check` has compared it with the heads
    own = examine(job) if state.is_local_main_process else []
    dist.barrier()  # machines are done with their disks
    reports: list[RankReport] = [None] * state.num_processes  # type: ignore[list-item]
    dist.all_gather_object(reports, rank_report(dims, state.device, size_mib=job.link_mib, findings=own))
    return [*machines(reports), *compare(reports)]


def rank_report(
    dims: ParallelDims, device: torch.device, *, size_mib: int | None, findings: Sequence[Finding]
) -> RankReport:
    """Measure. Collective over all ranks."""
    size_mib = size_mib or SIZE_MIB[device.type]
    figures, links = {"matrix product TFLOP/s": product_tflops(device)}, {}
    for axis in mesh_axes(dims, device.type):
        speeds = collective_speeds(axis, device, size_mib)
        figures |= {f"{axis.name} {name} GB/s": speed for name, speed in speeds.items()}
        links[axis.name] = link_speeds(axis, device, size_mib)
        dist.barrier()  # a group that is done must not disturb another one's measurement
    return RankReport(
        rank=dist.get_rank(), host=socket.gethostname(), software=software(device), figures=figures, links=links,
        findings=tuple(findings),
    )  # fmt: skip


def software(device: torch.device) -> dict[str, str]:
    """What must be, or had better be, the same everywhere."""
    versions = {name: metadata.version(name) for name in ("wan-accel", *TESTED)}
    found = {"Python": platform.python_version(), **versions}
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPU"] = torch.cuda.get_device_name(device)
        found["NVIDIA driver"] = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "unknown"
    return found


def machines(reports: Sequence[RankReport]) -> list[Finding]:
    """The first machine's findings in full; of the others those that are not ok and not the same as its own."""
    first, *others = [report for report in reports if report.findings]
    more = [
        replace(finding, name=f"{report.host}: {finding.name}")
        for report in others
        for finding in report.findings
        if finding.level != "ok" and finding not in first.findings
    ]
    return [*first.findings, *more]
