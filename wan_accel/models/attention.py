"""Attention processors and rotary position embedding.

Shapes: B batch, L query tokens, S key tokens, H heads, D head width.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


class CudnnAttention(SdpaAttention):
    """torch's cuDNN kernel and no other; an input that it cannot take is torch's error."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().forward(q, k, v)


class FlashAttention2(nn.Module):
    """The flash-attn package's kernel; fp16 and bf16 only."""

    module: ClassVar[str] = "flash_attn"

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.function: Any = importlib.import_module(self.module).flash_attn_func

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"model.attention: {self.module} takes bfloat16, not {q.dtype}: set mixed_precision: bf16 in the "
                "accelerate config, or model.attention: sdpa"
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))  # (B, L, H, D)
        out = self.function(q, k, v)
        # Early releases of version 3 return the softmax's sums beside it.
        return (out[0] if isinstance(out, tuple) else out).flatten(2)


class FlashAttention3(FlashAttention2):
    """FlashAttention 3 from the `hopper` folder of its repository."""

    module = "flash_attn_interface"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """A value of `model.attention`: its processor, and what it needs.

    capabilities: lowest and highest major compute capability. gpus: which they are. install: what to do without it.
    """

    processor: type[nn.Module]
    capabilities: tuple[int, int] = (0, 99)
    gpus: str = ""
    needs_cuda: bool = True
    install: str = ""


# What the packages' own READMEs say they need (Dao-AILab/flash-attention).
ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(processor=SdpaAttention, needs_cuda=False),
    "cudnn": AttentionBackend(processor=CudnnAttention, capabilities=(8, 99), gpus="Ampere and later"),
    "flash_2": AttentionBackend(
        processor=FlashAttention2,
        capabilities=(8, 99),
        gpus="Ampere and later",
        install="pip install flash-attn --no-build-isolation (it builds against the installed torch; CUDA 12 or later)",
    ),
    "flash_3": AttentionBackend(
        processor=FlashAttention3,
        capabilities=(9, 9),
        gpus="Hopper: H100, H200, H800, H20, GH200",
        install=(
            "git clone https://github.com/Dao-AILab/flash-attention, then in its folder hopper python setup.py install "
            "(CUDA 12.3 or later, an hour on few cores; MAX_JOBS bounds the memory)"
        ),
    ),
}


def check_attention(name: str, device: torch.device) -> None:
    """Check that a value of `model.attention` can run on a device.

    Raises:
        ValueError: another kind of device or GPU, or a package that is not installed; nothing else is used instead.
    """
    backend = ATTENTION_BACKENDS[name]
    if backend.needs_cuda and device.type != "cuda":
        raise ValueError(f"model.attention={name} needs an NVIDIA GPU, and this run is on {device.type}: use sdpa")
    lowest, highest = backend.capabilities
    if backend.needs_cuda and not lowest <= (major := torch.cuda.get_device_capability(device)[0]) <= highest:
        wanted = f"{lowest}.x" if lowest == highest else f"{lowest}.0 or more"
        raise ValueError(
            f"model.attention={name} needs compute capability {wanted} ({backend.gpus}), and "
            f"{torch.cuda.get_device_name(device)} has {major}.x: use sdpa"
        )
    module = getattr(backend.processor, "module", None)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ValueError(f"model.attention={name} needs the module {module}: {backend.install}; or use sdpa")


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
