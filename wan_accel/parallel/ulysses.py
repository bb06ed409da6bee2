"""Ulysses sequence parallelism: tokens split over a group, attention on whole sequences of a share of the heads.

Shapes: B batch, L all tokens, l = ceil(L / P) tokens of a rank, P group size, H heads, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from wan_accel.parallel.collectives import all_gather_single, reduce_scatter_single


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpan:
    """The contiguous tokens [start, start + length) of a sequence of whole frames that one rank works on.

    The last rank's span may reach beyond the sequence: those tokens are padding.
    """

    start: int
    length: int
    tokens_per_frame: int

    @property
    def first_frame(self) -> int:
        return self.start // self.tokens_per_frame

    @property
    def num_frames(self) -> int:
        """Frames that the span touches, at its start and end in part."""
        return -(-(self.start + self.length) // self.tokens_per_frame) - self.first_frame

    @property
    def _front(self) -> int:
        return self.start - self.first_frame * self.tokens_per_frame

    def in_first_frame(self, device: torch.device) -> Tensor:
        """Tell which of the span's tokens are of frame 0: (length, 1) bool."""
        return torch.arange(self.start, self.start + self.length, device=device).unsqueeze(1) < self.tokens_per_frame

    def frames_of(self, x: Tensor) -> Tensor:
        """Pick the span's frames from x (B, F, ...); frames beyond the sequence are zeros."""
        picked = x[:, self.first_frame : self.first_frame + self.num_frames]
        missing = self.num_frames - picked.shape[1]
        return torch.cat([picked, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else picked

    def to_frames(self, x: Tensor) -> Tensor:
        """(B, length, H, D) -> (B, num_frames, tokens_per_frame, H, D), zeros around the span."""
        back = self.num_frames * self.tokens_per_frame - self._front - self.length
        if self._front or back:  # F.pad copies even where it adds nothing
            x = F.pad(x, (0, 0, 0, 0, self._front, back))
        return x.unflatten(1, (self.num_frames, self.tokens_per_frame))

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_frames`."""
        return x.flatten(1, 2)[:, self._front : self._front + self.length]


class SequenceParallel:
    """Splits tokens over a process group and gathers them again.

    Every rank of the group holds the same inputs; each computes the whole loss. Gradients are then averaged
    over all ranks of the job like plain data parallelism, with no other scaling (see `gather`).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.group_name: str = group.group_name
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def span(self, num_tokens: int, tokens_per_frame: int) -> TokenSpan:
        """This rank's tokens of a sequence of `num_tokens`."""
        length = -(-num_tokens // self.size)
        return TokenSpan(start=self.rank * length, length=length, tokens_per_frame=tokens_per_frame)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Take this rank's slice of dim `dim`, zero-padded at the end; backward: zeros outside the slice."""
        length = -(-x.shape[dim] // self.size)
        start = min(self.rank * length, x.shape[dim])
        piece = x.narrow(dim, start, min(length, x.shape[dim] - start))
        padding = [0] * (2 * (x.ndim - dim))
        padding[-1] = length - piece.shape[dim]
        return F.pad(piece, padding) if padding[-1] else piece

    def gather(self, x: Tensor, num_tokens: int) -> Tensor:
        """All-gather (B, l, ...) over the group along dim 1 and cut to `num_tokens`.

        Backward: reduce-scatter with SUM. As each of the P ranks computes the whole loss, a rank's slice gets
        P times its gradient; the mean over the group's ranks, whose slices are disjoint, takes this back.
        """
        return _GatherTokens.apply(x, self.group)[:, :num_tokens]


class _GatherTokens(torch.autograd.Function):
    """All-gather along dim 1 over `group`; backward reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        x = x.transpose(0, 1).contiguous()
        out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
        all_gather_single(out, x, group=group)
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        group = ctx.group  # type: ignore[attr-defined]
        grad = grad.transpose(0, 1).contiguous()
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(group), *grad.shape[1:])
        reduce_scatter_single(out, grad, group=group)
        return out.transpose(0, 1), None


@torch.library.custom_op("wan_accel::exchange_chunks", mutates_args=())
def exchange_chunks(x: Tensor, group_name: str) -> Tensor:
    """All-to-all of dim 0 (P chunks) of a contiguous x over a group; its backward is the same exchange.

    An operator of its own can be compiled into a block, and is known by name to what decides on recomputation.
    """
    out = torch.empty_like(x)
    name: Any = group_name  # torch 2.14 has a type of its own for it, which an operator's schema cannot name
    dist.all_to_all_single(out, x, group=_resolve_process_group(name))
    return out


@exchange_chunks.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


def _exchange_setup(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return exchange_chunks(grad.contiguous(), ctx.group_name), None


exchange_chunks.register_autograd(_exchange_backward, setup_context=_exchange_setup)


class UlyssesAttention(nn.Module):
    """The processor of `block.self_attn.attn` under Ulysses: all-to-all, attention, all-to-all.

    Two all-to-alls of the group forward (q, k and v travel together) and two backward. `num_tokens` of the
    whole sequence is set by the denoiser before the blocks run: padding keys are cut off after the exchange, so
    no mask is needed and the result is exact.
    """

    def __init__(self, inner: nn.Module, parallel: SequenceParallel, num_heads: int) -> None:
        super().__init__()
        self.inner = inner
        self.parallel = parallel
        self.num_heads = num_heads
        self.num_tokens = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, l, H*D) -> (B, l, H*D)."""
        size, group = self.parallel.size, self.parallel.group_name
        length = q.shape[1]
        # Chunks first, so that stacking is the only copy.
        by_rank = [x.unflatten(-1, (size, -1)).movedim(2, 0) for x in (q, k, v)]  # (P, B, l, H/P*D) each
        qkv = exchange_chunks(torch.stack(by_rank, dim=1).contiguous(), group)  # (P: tokens, 3, B, l, H/P*D)
        qkv = qkv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.num_tokens]  # (3, B, L, H/P*D)
        out = self.inner(*qkv.unbind(0))
        missing = size * length - self.num_tokens
        out = (F.pad(out, (0, 0, 0, missing)) if missing else out).unflatten(1, (size, length))
        out = exchange_chunks(out.transpose(0, 1).contiguous(), group)  # (P: heads, B, l, H/P*D)
        return out.permute(1, 2, 0, 3).flatten(2)
