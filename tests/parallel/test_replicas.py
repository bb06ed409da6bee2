"""HSDP's sizes from the processes and machines of a launch."""

import os

import pytest

from wan_accel.parallel.replicas import Launch, launched_replicas, resolve, resolve_launched


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "per_machine", "expected"),
    [
        (-1, -1, 16, 8, (2, 8)),
        (-1, -1, 8, 8, (1, 8)),
        (-1, -1, 1, 1, (1, 1)),
        (-1, 16, 64, 8, (4, 16)),
        (-1, 4, 8, 8, (2, 4)),
        (2, -1, 64, 8, (2, 32)),
        (2, 8, 16, 4, (2, 8)),
    ],
)
def test_sizes(replicate: int, shard: int, world_size: int, per_machine: int, expected: tuple[int, int]) -> None:
    assert resolve(replicate, shard, Launch(world_size=world_size, per_machine=per_machine)) == expected


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "per_machine", "message"),
    [
        (2, 8, 8, 8, "dp_replicate_size=2, dp_shard_size=8 does not fit 8 processes, 8 a machine: leave both at -1"),
        (3, -1, 8, 8, "dp_replicate_size=3, dp_shard_size=-1 does not fit 8 processes"),
        (-1, 16, 8, 8, "dp_replicate_size=-1, dp_shard_size=16 does not fit 8 processes"),
        (-1, -1, 2, 1, "on 2 processes, 1 a machine, shards nothing: use recipes/accelerate/fsdp2.yaml"),
        (0, 8, 8, 8, "a size is at least 1, or -1 for what the launch has"),
    ],
)
def test_sizes_that_do_not_fit(replicate: int, shard: int, world_size: int, per_machine: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(replicate, shard, Launch(world_size=world_size, per_machine=per_machine))


def test_accelerate_reads_what_the_launch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    env = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}
    env |= {f"PARALLELISM_CONFIG_DP_{axis}_SIZE": "-1" for axis in ("REPLICATE", "SHARD")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launched_replicas(os.environ) == 4
    with pytest.raises(ValueError, match="must be at least 1, but got -1"):
        ParallelismConfig()  # why it has to be resolved before
    for _ in range(2):
        resolve_launched()
        sizes = ParallelismConfig()
        assert (sizes.dp_replicate_size, sizes.dp_shard_size) == (4, 4)


def test_without_a_launcher_there_is_one_replica() -> None:
    assert launched_replicas({}) == 1
    assert launched_replicas({"WORLD_SIZE": "8"}) == 1
