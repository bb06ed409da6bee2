"""Attention processors and rotary position embedding.

Shapes: B batch, L query tokens, S key tokens, H heads, D head width.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_ROPE_POSITIONS = 1024
ROPE_THETA = 10000.0


class SdpaAttention(nn.Module):
    """Scaled dot product attention without a mask, by torch's fastest kernel for the inputs.

    This is the processor at `block.self_attn.attn` and `block.cross_attn.attn`: parameter-free, called after
    the norms and RoPE as `attn(q, k, v)`, with q (B, L, H*D), k and v (B, S, H*D), returning (B, L, H*D).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is fp64 (the tests' precise reference runs)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=32)
def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (L, head_dim / 2), for the L = f*h*w tokens of a latent grid.

    The head's D dims are split into 2*(D//6) for rows, as many for columns and the rest for frames
    (wan/modules/model.py, `rope_params`, theta 1e4); angles are formed in fp64. One table a bucket stays on the
    device, so that a step copies nothing from the host.

    Raises:
        ValueError: a side of the grid is over 1024 positions.
    """
    if max(grid) > NUM_ROPE_POSITIONS:
        raise ValueError(f"latent grid {grid} (frames, rows, columns) exceeds the {NUM_ROPE_POSITIONS} RoPE positions")
    third = 2 * (head_dim // 6)
    angles = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * third, third, third))):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        table = torch.outer(torch.arange(size, dtype=torch.float64, device=device), ROPE_THETA**-exponents)
        shape = [1, 1, 1, table.shape[1]]
        shape[axis] = size
        angles.append(table.view(shape).expand(*grid, -1))
    tokens = torch.cat(angles, dim=-1).flatten(0, 2)
    return tokens.cos().to(dtype), tokens.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate neighbouring pairs of every head.

    Args:
        x: (B, L, H*D).
        cos, sin: (L, D/2) fp32.

    Returns:
        (B, L, H*D) in x's dtype, computed in fp32; against complex fp64 the difference is 5e-7 for fp32 input.
    """
    pairs = upcast(x).unflatten(-1, (num_heads, -1, 2))
    cos, sin = cos[:, None], sin[:, None]
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-3).to(x.dtype)
