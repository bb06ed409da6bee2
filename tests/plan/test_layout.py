"""Layouts as accelerate configs say them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from wan_accel.plan.layout import Layout, ZeroBuffers, read_layout

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [
        ("fsdp2", 64, Layout(engine="fsdp2", world_size=64, ulysses=4)),
        ("hsdp", 16, Layout(engine="fsdp2", world_size=16, ulysses=4)),  # on one machine
        ("zero3", 8, Layout(engine="zero3", world_size=8, ulysses=4)),
        ("zero2", 8, Layout(engine="zero2", world_size=8, ulysses=4)),
        ("cpu_zero2", 1, Layout(engine="zero2", world_size=1, ulysses=4, is_mixed=False)),
        ("zero2_offload", 8, Layout(engine="zero2", world_size=8, ulysses=4, offload="optimizer")),
        ("zero3_offload", 1, Layout(engine="zero3", world_size=1, ulysses=4, offload="parameters")),
        ("fsdp2_offload", 8, Layout(engine="fsdp2", world_size=8, ulysses=4, offload="parameters")),
        ("ddp", 8, Layout(engine="ddp", world_size=8, ulysses=4)),
        ("ddp", 1, Layout(engine="single", world_size=1, ulysses=4)),
        ("fsdp2", 1, Layout(engine="single", world_size=1, ulysses=4)),
        ("cpu_fsdp2", 2, Layout(engine="fsdp2", world_size=2, ulysses=4, is_mixed=False)),
    ],
)
def test_shipped_configs(name: str, processes: int, expected: Layout) -> None:
    assert read_layout(CONFIGS / f"{name}.yaml", num_processes=processes, ulysses=4) == expected


def changed(tmp_path: Path, name: str, **changes: Any) -> Path:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for section, value in changes.items():
        config[section] = {**config.get(section, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_what_a_config_changes(tmp_path: Path) -> None:
    path = changed(tmp_path, "fsdp2", num_processes=16, fsdp_config={"fsdp_reshard_after_forward": False})
    layout = read_layout(path, num_processes=None, ulysses=1)
    assert (layout.world_size, layout.reshard_after_forward, layout.num_shards) == (16, False, 16)
    path = changed(tmp_path, "zero3", deepspeed_config={"offload_optimizer_device": "cpu"})
    assert read_layout(path, num_processes=8, ulysses=1).offload == "optimizer"


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    sizes = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 8}
    with pytest.raises(ValueError, match="dp_replicate_size=2, dp_shard_size=8 does not fit 8 processes, 8 a machine"):
        read_layout(changed(tmp_path, "hsdp", parallelism_config=sizes), num_processes=8, ulysses=1)
    with pytest.raises(ValueError, match="12 processes are not a multiple of 8 machines"):
        read_layout(CONFIGS / "hsdp.yaml", num_processes=12, num_machines=8, ulysses=1)
    with pytest.raises(ValueError, match="does not say how many processes: give --num_processes"):
        read_layout(CONFIGS / "fsdp2.yaml", num_processes=None, ulysses=1)
    with pytest.raises(ValueError, match="fsdp_offload_params: true needs two processes or more"):
        read_layout(CONFIGS / "fsdp2_offload.yaml", num_processes=1, ulysses=1)
    with pytest.raises(ValueError, match="offload_param_device=cpu without the optimizer is not supported"):
        path = changed(tmp_path, "zero3", deepspeed_config={"offload_param_device": "cpu"})
        read_layout(path, num_processes=8, ulysses=1)
    with pytest.raises(ValueError, match="offload_param_device=cpu has no effect under ZeRO-2"):
        path = changed(tmp_path, "zero2", deepspeed_config={"offload_param_device": "cpu"})
        read_layout(path, num_processes=8, ulysses=1)
    with pytest.raises(ValueError, match="mixed_precision=fp16 is not honoured here: use bf16"):
        read_layout(changed(tmp_path, "fsdp2", mixed_precision="fp16"), num_processes=8, ulysses=1)
    with pytest.raises(ValueError, match="offload_optimizer_device=nvme is not honoured here: use cpu or none"):
        path = changed(tmp_path, "zero3", deepspeed_config={"offload_optimizer_device": "nvme"})
        read_layout(path, num_processes=8, ulysses=1)


@pytest.mark.parametrize(
    ("sizes", "processes", "machines", "expected"),
    [
        ((-1, -1), 16, 2, ("hsdp", 2, 8)),
        ((-1, -1), 64, 8, ("hsdp", 8, 8)),
        ((-1, -1), 1, 1, ("single", 1, 1)),
        ((-1, 16), 64, 8, ("hsdp", 4, 16)),
        ((2, -1), 64, 8, ("hsdp", 2, 32)),
        ((2, 4), 8, 1, ("hsdp", 2, 4)),
    ],
)
def test_replicas_of_any_count(
    sizes: tuple[int, int], processes: int, machines: int, expected: tuple[str, int, int], tmp_path: Path
) -> None:
    names = [f"parallelism_config_dp_{axis}_size" for axis in ("replicate", "shard")]
    path = changed(tmp_path, "hsdp", parallelism_config=dict(zip(names, sizes)))
    layout = read_layout(path, num_processes=processes, num_machines=machines, ulysses=1)
    assert (layout.engine, layout.dp_replicate, layout.num_shards) == expected


def test_a_bucket_size_that_the_launcher_would_drop(tmp_path: Path) -> None:
    path = changed(tmp_path, "zero3", deepspeed_config={"reduce_bucket_size": 1e8})
    with pytest.raises(ValueError, match=r"deepspeed_config\.reduce_bucket_size is not a field that accelerate"):
        read_layout(path, num_processes=8, ulysses=1)


def test_buffers_are_deepspeeds() -> None:
    config = DeepSpeedZeroConfig()
    names = {field.name: field.name.removeprefix("stage3_") for field in fields(ZeroBuffers)}
    assert ZeroBuffers() == ZeroBuffers(**{name: getattr(config, theirs) for name, theirs in names.items()})
