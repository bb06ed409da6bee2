"""Degrees of parallelism and the process groups that they need."""

import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wan_accel.parallel.degrees import usable_degrees


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDims:
    """How the ranks of a job are used.

    Ulysses groups are neighbouring ranks (inside a node where they fit). Parameters are sharded over
    `dp_shard` ranks, which include the Ulysses axis, and replicated `dp_replicate` times.
    """

    world_size: int
    ulysses: int = 1
    dp_replicate: int = 1

    @property
    def num_data_ranks(self) -> int:
        """Groups of ranks that see different samples."""
        return self.world_size // self.ulysses

    @property
    def dp_shard(self) -> int:
        return self.world_size // self.dp_replicate

    def data_rank(self, rank: int) -> int:
        return rank // self.ulysses

    def validate(self, num_heads: int) -> None:
        """Check the degrees against each other and the model.

        Raises:
            ValueError: they do not fit; the message says which do.
        """
        if num_heads % self.ulysses:
            degrees = ", ".join(map(str, usable_degrees(num_heads)))
            raise ValueError(f"parallel.ulysses={self.ulysses} does not divide num_heads={num_heads}: use {degrees}")
        if self.world_size % self.ulysses:
            fitting = [d for d in usable_degrees(num_heads) if self.world_size % d == 0]
            raise ValueError(
                f"parallel.ulysses={self.ulysses} does not divide the {self.world_size} processes: "
                f"use {', '.join(map(str, fitting))}, or start a multiple of {self.ulysses} processes"
            )
        if self.dp_shard * self.dp_replicate != self.world_size:
            raise ValueError(f"dp_replicate={self.dp_replicate} does not divide the {self.world_size} processes")
        if self.dp_shard % self.ulysses:
            raise ValueError(
                f"parallel.ulysses={self.ulysses} does not divide the {self.dp_shard} ranks of a shard group "
                f"({self.world_size} processes / dp_replicate={self.dp_replicate})"
            )

    def ulysses_group(self, device_type: str) -> dist.ProcessGroup | None:
        """This rank's Ulysses group; None without sequence parallelism. Collective over all ranks."""
        if self.ulysses == 1:
            return None
        shape = (self.num_data_ranks, self.ulysses)
        return _mesh(device_type, shape, ("data", "ulysses"), dist.group.WORLD)["ulysses"].get_group()

    def shard_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh for `fully_shard`: one axis, or (dp_replicate, dp_shard) for HSDP. Collective over all ranks."""
        if self.dp_replicate == 1:
            return _mesh(device_type, (self.world_size,), ("dp_shard",), dist.group.WORLD)
        shape = (self.dp_replicate, self.dp_shard)
        return _mesh(device_type, shape, ("dp_replicate", "dp_shard"), dist.group.WORLD)


@functools.cache
def _mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...], world: Any) -> DeviceMesh:
    """One mesh of a kind for a job (`world` is its group of all ranks): the experts of a pair share it.

    Each further one would cost communicators, and the name of its group is a constant of a compiled block, so that
    blocks of two experts could not share a graph.
    """
    return init_device_mesh(device_type, shape, mesh_dim_names=names)
