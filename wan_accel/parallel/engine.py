"""Which engine the launcher chose, and what it keeps in host memory: from its environment, and from accelerate."""

import json
import os
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from wan_accel.parallel.names import Engine, Offload, engine_of_stage, is_zero, zero_offload

_ENGINES: dict[DistributedType, Engine] = {
    DistributedType.NO: "single",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.FSDP: "fsdp2",
}


def detect_engine(accelerator: Accelerator) -> Engine:
    """Return the engine in force.

    Raises:
        ValueError: an engine that is not supported, or one that was asked for and did not come up.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return engine_of_stage(accelerator.state.deepspeed_plugin.zero_stage)
    if kind not in _ENGINES:
        raise ValueError(f"accelerate's {kind} is not supported: use a config of recipes/accelerate")
    engine = _ENGINES[kind]
    asked_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked_fsdp and engine == "ddp":
        raise ValueError(
            f"the accelerate config asks for FSDP but accelerate set up {kind}: call "
            "wan_accel.parallel.cpu.enable_fsdp_on_cpu() before TrainingArguments or Accelerator"
        )
    return engine


def detect_offload(accelerator: Accelerator, engine: Engine) -> Offload:
    """What the engine in force keeps in host memory.

    Raises:
        ValueError: places that are not supported.
    """
    if engine == "fsdp2":
        return "parameters" if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) else "none"
    if not is_zero(engine):
        return "none"
    config = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    places = {part: (config.get(f"offload_{part}") or {}).get("device") or "none" for part in ("optimizer", "param")}
    return zero_offload(engine, **places)


def launched_engine() -> Engine:
    """The engine that the launcher asks for in the environment, before an Accelerator exists.

    Raises:
        ValueError: one that is not supported, or offloading of FSDP2 on one process, where nothing is sharded.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return engine_of_stage(_launched_stage())
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_OFFLOAD_PARAMS"):
            raise ValueError(
                "fsdp_offload_params: true needs two processes or more: on one use zero3_offload.yaml, or no offloading"
            )
        return "single"
    return "fsdp2" if _is_set("ACCELERATE_USE_FSDP") else "ddp"


def launched_offload() -> Offload:
    """What the launcher asks to be kept in host memory.

    Raises:
        ValueError: places that are not supported.
    """
    engine = launched_engine()
    if engine == "fsdp2":
        return "parameters" if _is_set("FSDP_OFFLOAD_PARAMS") else "none"
    if not is_zero(engine):
        return "none"
    names = {part: f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE" for part in ("optimizer", "param")}
    return zero_offload(engine, **{part: os.environ.get(name, "none") for part, name in names.items()})


def _launched_stage() -> str:
    """Accelerate's launcher names a stage, or a file of DeepSpeed's that does."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return str(json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage"))
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # accelerate's own default


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
