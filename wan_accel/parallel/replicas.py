"""HSDP's replicas and shards, from what the accelerate config says and the processes that were launched. Torch-free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

# As a size: what the launch has. accelerate itself refuses it, so `resolve_launched` has to come before it.
FROM_LAUNCH = -1
_REPLICATE, _SHARD = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Processes of a job, and of each of its machines."""

    world_size: int
    per_machine: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Launch":
        """The one that this process belongs to; one process without a launcher."""
        world_size = int(environ.get("WORLD_SIZE", "1"))
        # torchrun and accelerate say it; without it a job is taken to be of one machine.
        return cls(world_size=world_size, per_machine=int(environ.get("LOCAL_WORLD_SIZE", world_size)))


def resolve(replicate: int, shard: int, launch: Launch) -> tuple[int, int]:
    """Replicas and shards whose product is the number of processes.

    Args:
        replicate, shard: accelerate's `dp_replicate_size` and `dp_shard_size`. -1 is filled in: shards with the
            processes of a machine, so that replicas are machines; or, where one size is given, with the rest.
        launch: the processes.

    Raises:
        ValueError: they do not fit the processes, or leave nothing to shard over.
    """
    world_size = launch.world_size
    asked = f"dp_replicate_size={replicate}, dp_shard_size={shard}"
    for size in (replicate, shard):
        if size != FROM_LAUNCH and size < 1:
            raise ValueError(f"parallelism_config with {asked}: a size is at least 1, or -1 for what the launch has")
    if replicate == shard == FROM_LAUNCH:
        shard = launch.per_machine
    if replicate == FROM_LAUNCH:
        replicate = world_size // shard
    if shard == FROM_LAUNCH:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise ValueError(
            f"parallelism_config with {asked} does not fit {world_size} processes, {launch.per_machine} a machine: "
            "leave both at -1 for a replica a machine, or let their product be the number of processes"
        )
    if shard == 1 and world_size > 1:
        raise ValueError(
            f"parallelism_config with {asked} on {world_size} processes, {launch.per_machine} a machine, shards "
            "nothing: use recipes/accelerate/fsdp2.yaml, or set parallelism_config_dp_shard_size to the GPUs of a copy"
        )
    return replicate, shard


def launched_replicas(environ: Mapping[str, str] = os.environ) -> int:
    """HSDP's number of replicas that the launcher asks for (accelerate's parallelism_config), 1 without it.

    Raises:
        ValueError: the sizes do not fit the processes.
    """
    return _launched(environ)[0]


def resolve_launched() -> None:
    """Write the sizes that the config leaves to the launch into the environment, where accelerate reads them.

    Before `TrainingArguments` or `Accelerator`; calling it again does nothing.

    Raises:
        ValueError: the sizes do not fit the processes.
    """
    if _is_asked_for(os.environ):
        replicate, shard = _launched(os.environ)
        os.environ.update({_REPLICATE: str(replicate), _SHARD: str(shard)})


def _is_asked_for(environ: Mapping[str, str]) -> bool:
    return environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"


def _launched(environ: Mapping[str, str]) -> tuple[int, int]:
    launch = Launch.of(environ)
    if not _is_asked_for(environ):
        return 1, launch.world_size
    return resolve(int(environ.get(_REPLICATE, "1")), int(environ.get(_SHARD, "1")), launch)
