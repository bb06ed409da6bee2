"""Degrees of parallelism and the process groups that they need."""

from dataclasses import dataclass

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
        return init_device_mesh(device_type, shape, mesh_dim_names=("data", "ulysses"))["ulysses"].get_group()

    def shard_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh for `fully_shard`: one axis, or (dp_replicate, dp_shard) for HSDP. Collective over all ranks."""
        if self.dp_replicate == 1:
            return init_device_mesh(device_type, (self.world_size,), mesh_dim_names=("dp_shard",))
        shape = (self.dp_replicate, self.dp_shard)
        return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
