"""How fast the axes of the mesh are: collectives of whole groups, and the link of each rank to its neighbour."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from wan_accel.parallel.collectives import all_gather_single, reduce_scatter_single
from wan_accel.parallel.mesh import ParallelDims

MIB = 2**20
# Of the whole tensor: large enough for bandwidth to count on GPUs, small enough for gloo.
SIZE_MIB = {"cuda": 64, "cpu": 4}
NUM_WARMUPS, NUM_REPEATS = 2, 5
NUM_PRODUCTS = 10  # in a row, so that starting them and waiting for them does not count


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """An axis of the mesh as this rank sees it: the group it is in, and that group's global ranks in order."""

    name: str
    group: dist.ProcessGroup
    ranks: tuple[int, ...]


# Names as in the report. whole (S), other (S): tensors of all ranks' bytes. part (S / n): this rank's.
COLLECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup], object]] = {
    "all-gather": lambda whole, other, part, group: all_gather_single(whole, part, group=group),
    "reduce-scatter": lambda whole, other, part, group: reduce_scatter_single(part, whole, group=group),
    "all-to-all": lambda whole, other, part, group: dist.all_to_all_single(other, whole, group=group),
    "all-reduce": lambda whole, other, part, group: dist.all_reduce(whole, group=group),
}


def mesh_axes(dims: ParallelDims, device_type: str) -> list[Axis]:
    """The axes over which training with these degrees communicates, innermost first. Collective over all ranks."""
    groups = {"ulysses": dims.ulysses_group(device_type)}
    mesh = dims.shard_mesh(device_type)
    for name in reversed(mesh.mesh_dim_names or ()):
        groups[name] = mesh[name].get_group()
    return [
        Axis(name=name, group=group, ranks=tuple(dist.get_process_group_ranks(group)))
        for name, group in groups.items()
        if group is not None and dist.get_world_size(group) > 1
    ]


def collective_speeds(axis: Axis, device: torch.device, size_mib: int) -> dict[str, float]:
    """Algorithm bandwidth in GB/s by collective: S bytes of the whole tensor over the median time. Collective.

    A rank sends (n - 1) / n of that a second, twice that in an all-reduce. All ranks of a group see nearly the same
    time, the slowest one's.
    """
    size = len(axis.ranks)
    numbers = size_mib * MIB // 4 // size * size
    whole, other = (torch.zeros(numbers, device=device) for _ in range(2))
    part = torch.zeros(numbers // size, device=device)
    speeds = {}
    for name, collective in COLLECTIVES.items():
        seconds = _median_seconds(partial(collective, whole, other, part, axis.group), axis, device)
        speeds[name] = 4 * numbers / seconds / 1e9
    return speeds


def link_speeds(axis: Axis, device: torch.device, size_mib: int) -> dict[int, float]:
    """GB/s in each direction to this rank's neighbours on the axis' ring, by their rank. Collective over the group.

    Disjoint pairs exchange at the same time, so that a slow link slows no other pair.
    """
    rank, numbers = dist.get_rank(), size_mib * MIB // 4
    sent, received = (torch.zeros(numbers, device=device) for _ in range(2))
    speeds = {}
    for pairs in ring_phases(axis.ranks):
        dist.barrier(axis.group)
        for pair in pairs:
            if rank in pair:
                other = pair[0] if rank == pair[1] else pair[1]
                seconds = _median_seconds(partial(_exchange, sent, received, other, axis), None, device)
                speeds[other] = 4 * numbers / seconds / 1e9
    return speeds


def ring_phases(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Neighbours on a ring in rounds of disjoint pairs: two rounds, or three for an odd number of ranks."""
    size = len(ranks)
    pairs = [(ranks[place], ranks[(place + 1) % size]) for place in range(size if size > 2 else size - 1)]
    last = [pairs.pop()] if size > 2 and size % 2 else []
    return [phase for phase in (pairs[::2], pairs[1::2], last) if phase]


def _exchange(sent: Tensor, received: Tensor, other: int, axis: Axis) -> None:
    operations = [
        dist.P2POp(dist.isend, sent, other, axis.group),
        dist.P2POp(dist.irecv, received, other, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _median_seconds(run: Callable[[], object], axis: Axis | None, device: torch.device) -> float:
    """Of a call that communicates; the ranks of an axis start each repeat together."""
    times = []
    for repeat in range(NUM_WARMUPS + NUM_REPEATS):
        if axis is not None:
            dist.barrier(axis.group)
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if repeat >= NUM_WARMUPS:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_tflops(device: torch.device) -> float:
    """TFLOP/s of a matrix product: bf16 on a GPU, where a hot or throttled one shows; fp32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left = torch.randn(side, side, device=device, dtype=dtype)
    seconds = _median_seconds(lambda: [left @ left for _ in range(NUM_PRODUCTS)], None, device)
    return NUM_PRODUCTS * 2 * side**3 / seconds / 1e12
