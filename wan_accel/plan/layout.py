"""How a run is laid out over processes, as an accelerate config and a recipe say. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from wan_accel.parallel.names import Offload, is_zero
from wan_accel.parallel.replicas import Launch, resolve
from wan_accel.recipe.check import read_engine, read_offload

PlannedEngine = Literal["single", "ddp", "fsdp2", "hsdp", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroBuffers:
    """Elements of ZeRO's buffers, of which ZeRO-2 has the first; defaults are DeepSpeed's (0.19, zero/config.py)."""

    reduce_bucket_size: int = 500_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Processes, one a GPU, and what they share.

    offload: what lies in host memory: nothing, gradients and optimizer (ZeRO), or these and the parameters.
    reshard_after_forward: FSDP2 frees gathered parameters between forward and backward.
    is_mixed: computes in bf16 over fp32 masters.
    """

    engine: PlannedEngine
    world_size: int
    ulysses: int = 1
    dp_replicate: int = 1
    is_mixed: bool = True
    reshard_after_forward: bool = True
    offload: Offload = "none"
    zero: ZeroBuffers = ZeroBuffers()

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of parameters (not under ZeRO-2), gradients and optimizer state."""
        return 1 if self.engine in ("single", "ddp") else self.world_size // self.dp_replicate

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards, with replicas or without."""
        return self.engine in ("fsdp2", "hsdp")

    @property
    def can_be_simulated(self) -> bool:
        """Whether a micro step on fake tensors says what a GPU holds."""
        return self.is_sharded and self.offload == "none"

    @property
    def num_data_ranks(self) -> int:
        return self.world_size // self.ulysses

    def describe(self) -> str:
        """In words, for a report."""
        parts = [self.engine, f"{self.world_size} GPUs"]
        if self.dp_replicate > 1:
            parts.append(f"{self.dp_replicate} replicas x {self.num_shards} shards")
        parts.append(f"ulysses {self.ulysses}")
        parts.append("bf16 over fp32" if self.is_mixed else "no mixed precision")
        if self.offload != "none":
            parts.append(f"{self.offload} in host memory")
        return ", ".join(parts)


def read_layout(path: Path, *, num_processes: int | None, ulysses: int, num_machines: int | None = None) -> Layout:
    """The layout of an accelerate config file and a recipe's `parallel.ulysses`, as a launch would have it.

    Raises:
        ValueError: the file cannot be read, asks for what is not supported, or does not fit the number of processes.
    """
    engine = read_engine(path)
    config: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    world_size = num_processes or config.get("num_processes")
    if world_size is None:
        raise ValueError(f"{path} does not say how many processes: give --num_processes")
    if engine == "single" and world_size > 1:
        raise ValueError(f"{path} is for one process, --num_processes {world_size} was given: use another config")
    offload = read_offload(path)
    if world_size == 1 and not is_zero(engine):
        if offload != "none":
            raise ValueError(f"{path}: fsdp_offload_params: true needs two processes or more: use zero3_offload.yaml")
        engine = "single"  # as a launch of one process is
    replicas = _replicas(path, config, world_size, num_machines) if engine == "hsdp" else 1
    if replicas == 1 and engine == "hsdp":
        engine = "fsdp2"  # one machine
    return Layout(
        engine=engine,  # type: ignore[arg-type]
        world_size=world_size,
        ulysses=ulysses,
        dp_replicate=replicas,
        is_mixed=_is_mixed(config),
        reshard_after_forward=bool((config.get("fsdp_config") or {}).get("fsdp_reshard_after_forward", True)),
        offload=offload,
    )


def _replicas(path: Path, config: Mapping[str, Any], world_size: int, num_machines: int | None) -> int:
    sizes = config.get("parallelism_config") or {}
    replicate, shard = (int(sizes.get(f"parallelism_config_dp_{axis}_size", 1)) for axis in ("replicate", "shard"))
    machines = num_machines or int(config.get("num_machines") or 1)
    if world_size % machines:
        raise ValueError(f"{path}: {world_size} processes are not a multiple of {machines} machines: give others")
    try:
        return resolve(replicate, shard, Launch(world_size=world_size, per_machine=world_size // machines))[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_mixed(config: Mapping[str, Any]) -> bool:
    return str(config.get("mixed_precision")) == "bf16"
