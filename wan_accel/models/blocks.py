"""Our forward for diffsynth's modules: transformer block, face block, head, fp32 linear.

Each class adopts the children and parameters of the module it is made from, so that names in the state dict
stay the original Wan names. Shapes: B batch, L tokens (of this rank), S text tokens, C model width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_animate_adapter import FaceBlock
from diffsynth.models.wan_video_dit import DiTBlock, Head, RMSNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan_accel.models.attention import SdpaAttention, apply_rope, upcast
from wan_accel.parallel.ulysses import TokenSpan

NUM_CLIP_TOKENS = 257


def adopt(target: nn.Module, source: nn.Module) -> None:
    """Register `source`'s own parameters and children on `target` under the same names."""
    for name, parameter in source.named_parameters(recurse=False):
        target.register_parameter(name, parameter)
    for name, child in source.named_children():
        target.add_module(name, child)


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 (fp64 for fp64 weights), whatever its weights' dtype and autocast say.

    The timestep embedding has to be exact: bf16 knows only 294 of the 1000 timesteps.
    """

    def __init__(self, source: nn.Linear) -> None:
        # Not through nn.Linear, on meta: DeepSpeed's zero.Init (0.19) takes a layer that is made there for torch's
        # skip_init, and leaves `_apply` of every module class patched, so that whatever is moved later is partitioned.
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(upcast(x), upcast(self.weight), upcast(self.bias))


class CheckpointedModule(nn.Module):
    """A module whose forward is recomputed in the backward pass when `checkpointing` is set.

    The switch sits inside `forward`, so that sharding hooks (around `__call__`) gather the parameters once for
    recomputation and backward together. The same holds for compiled code, which then contains the recomputation.

    checkpointing: recompute, all of it or what `contexts` (selective checkpointing) say.
    compiled: `run` compiled, for passes with gradients.
    """

    checkpointing = False
    contexts: Callable[[], tuple[Any, Any]] | None = None
    compiled: Callable[..., Tensor] | None = None

    def forward(self, *args: object) -> Tensor:
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled(*args)
        return self.run(*args)

    def run(self, *args: object) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.compute(*args)
        # Blocks draw no random numbers, so there is no state to keep.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.contexts is not None:
            options["context_fn"] = self.contexts
        return checkpoint(self.compute, *args, **options)

    def compute(self, *args: object) -> Tensor:
        raise NotImplementedError


class WanBlock(CheckpointedModule):
    """One transformer block: self-attention, cross-attention to text (and CLIP image), feed-forward."""

    self_attn: Any
    cross_attn: Any
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    ffn: nn.Module
    modulation: nn.Parameter

    def __init__(self, source: DiTBlock) -> None:
        super().__init__()
        adopt(self, source)
        self.num_heads = source.num_heads
        self.has_image = source.cross_attn.has_image_input
        for attention in (self.self_attn, self.cross_attn):
            attention.attn = SdpaAttention(self.num_heads)
            for module in attention.modules():
                if isinstance(module, RMSNorm):
                    module.use_torch_norm = True  # one fused kernel, fp32 inside

    def compute(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        in_first_frame: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: (B, L, C).
            context: (B, [257 +] S, C), CLIP tokens first where the variant has them.
            modulation: (B, 6, C) fp32, the timestep's share of shift, scale and gate; with `in_first_frame`
                (B, 2, 6, C), a row for the tokens of the first frame and one for the others.
            cos, sin: (L, D/2) fp32.
            in_first_frame: (L, 1) bool, where the first frame has a timestep of its own.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation_of_tokens(
            upcast(self.modulation), modulation, in_first_frame
        )
        x = add_gated(x, gate_1, self._self_attention(modulate(self.norm1, x, shift_1, scale_1), cos, sin))
        x = x + self._cross_attention(self.norm3(x), context)
        return add_gated(x, gate_2, self.ffn(modulate(self.norm2, x, shift_2, scale_2)))

    def _self_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = self.self_attn
        q = apply_rope(normalise(attention.norm_q, attention.q(x)), cos, sin, self.num_heads)
        k = apply_rope(normalise(attention.norm_k, attention.k(x)), cos, sin, self.num_heads)
        return attention.o(attention.attn(q, k, attention.v(x)))

    def _cross_attention(self, x: Tensor, context: Tensor) -> Tensor:
        attention = self.cross_attn
        q = normalise(attention.norm_q, attention.q(x))
        text = context[:, NUM_CLIP_TOKENS:] if self.has_image else context
        out = attention.attn(q, normalise(attention.norm_k, attention.k(text)), attention.v(text))
        if self.has_image:
            image = context[:, :NUM_CLIP_TOKENS]
            k = normalise(attention.norm_k_img, attention.k_img(image))
            out = out + attention.attn(q, k, attention.v_img(image))
        return attention.o(out)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) in x's dtype: CUDA's autocast runs rms_norm in fp32 (torch 2.12 and later) and would leave it there."""
    return norm(x).to(x.dtype)


def modulation_of_tokens(own: Tensor, timestep: Tensor, in_first_frame: Tensor | None) -> tuple[Tensor, ...]:
    """A module's own modulation plus its timestep's, split into what `modulate` and `add_gated` take.

    Args:
        own: (1, n, C).
        timestep: (B, n or 1, C); with `in_first_frame` (B, 2, n or 1, C).
        in_first_frame: (L, 1) bool.

    Returns:
        n tensors (B, 1, C), one value for all tokens; with `in_first_frame` (B, L, C), each token's row picked.
    """
    if in_first_frame is None:
        return (own + timestep).unsqueeze(2).unbind(1)
    first, others = ((own + row).unsqueeze(2).unbind(1) for row in timestep.unbind(1))
    return tuple(torch.where(in_first_frame, *rows) for rows in zip(first, others))


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift in fp32, returned in x's dtype."""
    return torch.addcmul(shift, upcast(norm(x)), 1 + scale).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """x + gate * residual in fp32, returned in x's dtype."""
    return torch.addcmul(upcast(x), gate, upcast(residual)).to(x.dtype)


class WanFaceBlock(CheckpointedModule):
    """Animate's face adapter: each token attends to the motion tokens of its own latent frame."""

    linear1_q: nn.Module
    linear1_kv: nn.Module
    linear2: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    pre_norm_feat: nn.Module
    pre_norm_motion: nn.Module

    def __init__(self, source: FaceBlock) -> None:
        super().__init__()
        adopt(self, source)
        self.num_heads = source.heads_num

    def compute(self, x: Tensor, motion: Tensor, span: TokenSpan) -> Tensor:  # type: ignore[override]
        """Return x plus the adapter's output.

        Args:
            x: (B, L, C), the tokens `span` of the whole sequence.
            motion: (B, F, N, C), N motion tokens for each of the F latent frames, reference slot included.
        """
        q = self.q_norm(self._heads(self.linear1_q(self.pre_norm_feat(x))))  # (B, L, H, D)
        k, v = self.linear1_kv(self.pre_norm_motion(span.frames_of(motion))).chunk(2, dim=-1)
        k, v = self.k_norm(self._heads(k)), self._heads(v)  # (B, f, N, H, D)
        q = span.to_frames(q).flatten(0, 1).transpose(1, 2)  # (B*f, H, tokens of a frame, D)
        k, v = (y.flatten(0, 1).transpose(1, 2).to(q.dtype) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = span.to_tokens(out.unflatten(0, (x.shape[0], -1)))
        return x + self.linear2(out.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class WanHead(nn.Module):
    """The output layer: modulated norm, then a linear to patch pixels of the velocity."""

    head: nn.Linear
    norm: nn.Module
    modulation: nn.Parameter

    def __init__(self, source: Head) -> None:
        super().__init__()
        adopt(self, source)

    def forward(self, x: Tensor, time_embedding: Tensor, in_first_frame: Tensor | None = None) -> Tensor:
        """Map (B, L, C) with the time embedding (B, C) fp32, (B, 2, C) as in a block, to (B, L, out_dim * patch)."""
        shift, scale = modulation_of_tokens(upcast(self.modulation), time_embedding.unsqueeze(-2), in_first_frame)
        return self.head(modulate(self.norm, x, shift, scale))
