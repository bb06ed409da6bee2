"""The settings in force of a launched run are those of its accelerate config, read off what acts on them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import write_checkpoint
from launched import in_force, launched_env, write_config
from ranks import run_ranks
from torch import bfloat16, float32

from wan_accel.plan.layout import ZeroBuffers, read_layout

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
ENGINES = {"FSDP": "fsdp2", "MULTI_GPU": "ddp"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


def check(path: Path, base: str, tmp_path: Path) -> None:
    """Launch a config on 2 processes, HSDP on 4 that two machines share, and compare."""
    config = yaml.safe_load(path.read_text())
    is_hsdp = "parallelism_config" in config
    processes, machines = (4, 2) if is_hsdp else (2, 1)
    kind = config["distributed_type"]
    engine = f"zero{config['deepspeed_config']['zero_stage']}" if kind == "DEEPSPEED" else ENGINES[kind]
    env = {**launched_env(path, processes=processes), "LOCAL_WORLD_SIZE": str(processes // machines)}
    env |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {}
    arguments = (base, str(tmp_path / "run"), "hsdp" if is_hsdp else engine)
    layout = read_layout(path, num_processes=processes, num_machines=machines, ulysses=1)
    for found in run_ranks(in_force, processes, *arguments, env=env):
        assert found["engine"] == found["launched"] == engine
        assert found["layout"] == layout
        assert found["precision"] == config["mixed_precision"]
        assert (found["accumulation"], found["dynamo"].lower()) == (1, "no")
        assert found["dims"] == (machines, processes // machines)
        checks = {"fsdp2": check_fsdp, "zero2": check_zero, "zero3": check_zero, "ddp": check_ddp}
        checks[engine](found, config, machines)


def check_fsdp(found: dict[str, Any], config: dict[str, Any], machines: int) -> None:
    asked, is_mixed = config["fsdp_config"], config["mixed_precision"] == "bf16"
    assert set(found["units"]) == {"", "blocks.0", "blocks.1"}
    for unit in found["units"].values():
        assert unit["reshards"] is asked["fsdp_reshard_after_forward"]
        assert unit["mesh"] == (((2, 2), (0, 1, 2, 3)) if machines > 1 else ((2,), (0, 1)))
        assert unit["param_dtype"] == (bfloat16 if is_mixed else None)
        assert unit["reduce_dtype"] == (float32 if is_mixed else None)
        assert not unit["casts_inputs"] and unit["output_dtype"] is None
        assert (unit["offload"] == "CPUOffloadPolicy") is asked["fsdp_offload_params"]
    assert found["dtypes"] == {"torch.float32"}


def check_zero(found: dict[str, Any], config: dict[str, Any], machines: int) -> None:
    asked, zero = config["deepspeed_config"], found["zero"]
    assert zero["stage"] == asked["zero_stage"]
    assert zero["is_partitioned"] is (asked["zero_stage"] == 3)
    assert zero["offload"] == (asked["offload_optimizer_device"], asked["offload_param_device"])
    assert zero["accumulation"] == 1
    assert zero["clipping"] == 0.25  # training.max_grad_norm
    assert zero["bf16"] is (config["mixed_precision"] == "bf16")
    assert zero["reduce_bucket_size"] == asdict(ZeroBuffers())["reduce_bucket_size"]


def check_ddp(found: dict[str, Any], config: dict[str, Any], machines: int) -> None:
    assert found["wrapper"] == "DistributedDataParallel"
    assert found["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_are_in_force(name: str, base: str, tmp_path: Path) -> None:
    check(CONFIGS / f"{name}.yaml", base, tmp_path)


def test_parameters_stay_gathered_where_the_config_says_so(base: str, tmp_path: Path) -> None:
    kept = {"fsdp_reshard_after_forward": False}
    check(write_config(tmp_path / "config.yaml", CONFIGS / "fsdp2.yaml", fsdp_config=kept), base, tmp_path)
