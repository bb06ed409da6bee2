"""Which engine the launcher chose, read from accelerate's state."""

import os
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType

Engine = Literal["single", "ddp", "fsdp2", "zero3"]

_ENGINES: dict[DistributedType, Engine] = {
    DistributedType.NO: "single",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.FSDP: "fsdp2",
    DistributedType.DEEPSPEED: "zero3",
}


def detect_engine(accelerator: Accelerator) -> Engine:
    """Return the engine in force.

    Raises:
        ValueError: an engine that is not supported, or one that was asked for and did not come up.
    """
    kind = accelerator.distributed_type
    if kind not in _ENGINES:
        raise ValueError(f"accelerate's {kind} is not supported: use a config of recipes/accelerate")
    engine = _ENGINES[kind]
    asked_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked_fsdp and engine == "ddp":
        raise ValueError(
            f"the accelerate config asks for FSDP but accelerate set up {kind}: call "
            "wan_accel.parallel.cpu.enable_fsdp_on_cpu() before TrainingArguments or Accelerator"
        )
    if engine == "zero3" and accelerator.state.deepspeed_plugin.zero_stage != 3:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        raise ValueError(f"zero_stage={stage} is not supported yet: use ZeRO-3 (recipes/accelerate/zero3.yaml)")
    return engine
