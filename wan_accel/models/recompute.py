"""What a block keeps for its backward pass and what it computes again (`memory.activation_checkpointing`)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Policy = Literal["full", "attention", "none"]

# Never run again under a policy that saves: attention is the dearest operation of a block, and a collective that is
# run again waits for the slowest rank again. By name: FlashAttention's operators exist only once it is imported.
SAVED_OPERATORS = frozenset(
    [
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "wan_accel::exchange_chunks",
    ]
)


def is_saved(operator: Any) -> bool:
    """Tell whether an operator's output is kept: those of attention and of Ulysses' exchanges."""
    return operator.name().split(".")[0] in SAVED_OPERATORS


def _decide(otherwise: CheckpointPolicy, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_saved(operator) else otherwise


def _contexts(otherwise: CheckpointPolicy) -> Callable[[], tuple[Any, Any]]:
    """Selective checkpointing's contexts: what `is_saved` names is kept, the rest as `otherwise` says.

    torch caches a compiled graph on disk, for the next start, only if it can tell that the contexts are the same: by
    their `cache_hash` (torch 2.11 and later). This file is all that they depend on.
    """
    contexts: Any = partial(create_selective_checkpoint_contexts, partial(_decide, otherwise))
    contexts.cache_hash = f"{otherwise.name} {_SOURCE_HASH}"
    return contexts


_SOURCE_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """How a block runs: under `torch.utils.checkpoint` or not, with which contexts, with which compiler budget."""

    checkpointing: bool = True
    contexts: Callable[[], tuple[Any, Any]] | None = None
    budget: float = 1.0


_POLICIES = {
    "full": Recompute(),
    "attention": Recompute(contexts=_contexts(CheckpointPolicy.PREFER_RECOMPUTE)),
    "none": Recompute(checkpointing=False),
}


def recompute_of(policy: Policy | float) -> Recompute:
    """What a value of `memory.activation_checkpointing` means.

    A number in (0, 1) is the share of what `none` would keep that the compiler's partitioner may keep; it recomputes
    what is cheapest (`torch._functorch.config.activation_memory_budget`). Attention and Ulysses' exchanges are kept
    whatever the budget.

    Raises:
        ValueError: a number outside (0, 1).
    """
    if isinstance(policy, str):
        return _POLICIES[policy]
    if not 0 < policy < 1:
        raise ValueError(
            f"memory.activation_checkpointing={policy}: a budget lies between 0 and 1; use full or none at the ends"
        )
    # PREFER_SAVE: the compiler saves what fits its budget.
    return Recompute(contexts=_contexts(CheckpointPolicy.PREFER_SAVE), budget=policy)
