"""The engines by name, and what they can keep in host memory. Torch-free."""

from typing import Any, Literal

Engine = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
# Nothing; gradients and optimizer (ZeRO); these and the parameters (ZeRO-3, FSDP2).
Offload = Literal["none", "optimizer", "parameters"]


def is_zero(engine: str | None) -> bool:
    """Whether DeepSpeed drives the run: it reduces, clips, steps and saves by itself."""
    return engine in ("zero2", "zero3")


def engine_of_stage(stage: Any) -> Engine:
    """The engine of a ZeRO stage.

    Raises:
        ValueError: a stage that is not supported.
    """
    engines: dict[str, Engine] = {"2": "zero2", "3": "zero3"}
    if str(stage) not in engines:
        raise ValueError(f"zero_stage={stage} is not supported: use 2 or 3 (recipes/accelerate/zero2.yaml, zero3.yaml)")
    return engines[str(stage)]


def zero_offload(engine: str, *, optimizer: str, param: str) -> Offload:
    """What ZeRO keeps in host memory.

    Args:
        engine: `zero2` or `zero3`.
        optimizer: the config's `offload_optimizer_device`.
        param: its `offload_param_device`.

    Raises:
        ValueError: places that are not supported, or that DeepSpeed would not honour.
    """
    for part, place in (("optimizer", optimizer), ("param", param)):
        if place not in ("none", "cpu"):
            raise ValueError(f"offload_{part}_device={place} is not supported: use none or cpu")
    if param == "cpu" and engine == "zero2":
        raise ValueError("offload_param_device=cpu has no effect under ZeRO-2: use none, or zero_stage: 3")
    if param == "cpu" and optimizer == "none":
        raise ValueError("offload_param_device=cpu without the optimizer is not supported: set both to cpu")
    return "parameters" if param == "cpu" else "optimizer" if optimizer == "cpu" else "none"
