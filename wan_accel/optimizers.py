"""Which optimizers train correctly on which engine, and what they hold. Torch-free."""

import math
from collections.abc import Sequence

from wan_accel.parallel.names import Offload, is_zero

# Names of transformers' OptimizerNames, each with the engines on which it is not right, and why.
_UNUSABLE: dict[str, dict[str, str]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "sgd": {},
    # transformers' Adafactor makes its row and column statistics as plain tensors, which do not mix with sharded
    # parameters; DeepSpeed hands it flat slices of many parameters, which have no rows.
    "adafactor": {
        "fsdp2": "it cannot work on sharded parameters",
        "zero3": "ZeRO gives it flat slices, so that its row and column statistics would mean nothing",
    },
    # torchao quantizes a tensor only if 256 divides its elements; of ZeRO's flat slices that is true by chance.
    "adamw_torch_8bit": {"zero3": "ZeRO gives it flat slices, which it would mostly leave unquantized"},
}
_SHARDED_LIKE = {"hsdp": "fsdp2", "zero2": "zero3"}
# Accelerate hands ZeRO's offloading a DeepSpeedCPUAdam in place of any other (1.15, `map_pytorch_optim_to_deepspeed`):
# of these two it is the same update.
_OFFLOADED = ("adamw_torch", "adamw_torch_fused")


def usable_optimizers(engine: str | None = None, offload: Offload = "none") -> list[str]:
    """Optimizers for `training.optim` on an engine; on any engine where it is None."""
    if is_zero(engine) and offload != "none":
        return list(_OFFLOADED)
    engine = _SHARDED_LIKE.get(engine or "", engine)
    return [name for name, refused in _UNUSABLE.items() if engine not in refused]


def optimizer_problem(optim: str, engine: str | None = None, offload: Offload = "none") -> str | None:
    """What is wrong with `training.optim` on an engine (as `recipe.check` takes it), None if nothing."""
    usable = usable_optimizers(engine, offload)
    if optim in usable:
        return None
    where = f" with {engine}" if engine else ""
    if optim in usable_optimizers(engine):
        return (
            f"training.optim={optim} cannot be used{where} and offloading: accelerate would put DeepSpeed's AdamW for "
            f"the CPU in its place; use {', '.join(usable)}"
        )
    reason = _UNUSABLE.get(optim, {}).get(_SHARDED_LIKE.get(engine or "", engine or ""), "it is not tested here")
    return f"training.optim={optim} cannot be used{where}: {reason}; use {', '.join(usable)}"


# Trainer's choice where a recipe names none (transformers, `TrainingArguments.optim`).
DEFAULT_OPTIM = "adamw_torch_fused"
# torchao keeps a tensor of at least so many elements in blocks of 256, each with an fp32 scale.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


def state_bytes(optim: str, shape: Sequence[int]) -> int:
    """Bytes that an optimizer keeps for one fp32 parameter (or shard of one), single step counts left out."""
    numel = math.prod(shape)
    if optim.startswith("adamw_torch") and not optim.endswith("8bit"):
        return 8 * numel  # two fp32 moments
    if optim == "adamw_torch_8bit":
        if numel < _SMALLEST_8BIT or numel % _BLOCK_8BIT:
            return 8 * numel
        return 2 * (numel + 4 * numel // _BLOCK_8BIT)
    if optim == "adafactor":  # without a first moment; of matrices the second one by rows and columns
        return 4 * (numel // shape[-1] + numel // shape[-2]) if len(shape) > 1 else 4 * numel
    assert optim == "sgd", f"{optim} has no row here"
    return 0


def step_bytes(optim: str, numel: int) -> int:
    """Bytes that a step needs beside parameters, gradients and state, all parameters of a group at once."""
    return 4 * numel if optim == "adamw_torch" else 0
