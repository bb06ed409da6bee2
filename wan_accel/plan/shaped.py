"""Operators of a GPU in place of the CPU's: fake tensors on the CPU then take the memory that a GPU's would."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_accel.models import fp8
from wan_accel.models.attention import rope_table


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention: keeps its output and the softmax's sums. cuDNN's and the packages' kernels keep the same."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel; the CPU makes it of five operators in fp32."""
    return torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]


def _scaled_product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """The product in 8 bits, which the CPU emulates in fp32."""
    return torch.ops.aten._scaled_mm(left, right, left_scale, right_scale, None, None, dtype, fast)


_REPLACED = (
    (F, "scaled_dot_product_attention", _attention),
    (F, "rms_norm", _rms_norm),
    (fp8, "scaled_product", _scaled_product),
)


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Let models call them. Only for fake tensors: a CPU has no such kernels.

    A table of RoPE angles that is made inside is fake too, and must not be found by a real forward pass.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    rope_table.cache_clear()
    try:
        for owner, name, replacement in _REPLACED:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        rope_table.cache_clear()
