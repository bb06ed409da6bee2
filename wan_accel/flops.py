"""Floating point operations of a training step, and what a GPU can do: TFLOP/s and MFU of the log line. Torch-free.

These are model FLOPs as in Chowdhery et al. 2022 (PaLM), appendix B: what forward and backward need, whatever is
recomputed. A product of (m, k) and (k, n) costs 2 * m * k * n. Backward costs a linear layer that again for the
gradient of its input, and that again for its weight's, which a frozen layer does not need; attention costs twice its
forward. L tokens of a sample, C model width, S text tokens.
"""

from dataclasses import dataclass

from wan_accel.models.variants import TEXT_LENGTH, DitSize

NUM_CLIP_TOKENS = 257
# Animate: every fifth block is followed by a face block; a latent frame has 4 faces and the encoder's padding token.
FACE_BLOCK_EVERY = 5
MOTION_TOKENS_PER_FRAME = 5
# Dense bf16 matrix products with fp32 sums, TFLOP/s a GPU, by a part of the name that torch gives it; the longest match
# counts. From NVIDIA's data sheets, halved where they show sparse figures; the RTX cards' from their architecture
# papers (appendix A: FP16 tensor TFLOPS with FP32 accumulate). An unknown GPU has no MFU in the log: add a row.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.05,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4090 D": 147.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name, None where the table does not know it."""
    matches = [part for part in PEAK_TFLOPS if part in device_name]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is computed for one sample beside the DiT itself, and what is trained.

    lora_rank: of adapters on q, k, v, o and both feed-forward layers; None if every weight is trained.
    has_face_blocks: Animate's adapter is there.
    """

    lora_rank: int | None = None
    has_face_blocks: bool = False
    text_length: int = TEXT_LENGTH


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of matrix products with weights, and of attention, which GPUs run at other speeds."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def step_flops(size: DitSize, num_tokens: int, work: Work) -> float:
    """FLOPs of forward and backward of one sample of `num_tokens` tokens.

    Counted are the blocks (attention, feed-forward, face blocks), their adapters, and the layers around them that see
    every token (patch embedding, head). Norms, modulation and embeddings of text and time are below 0.1%.
    """
    return split_step_flops(size, num_tokens, work).total


def split_step_flops(size: DitSize, num_tokens: int, work: Work) -> StepFlops:
    """`step_flops` by kind."""
    blocks = _blocks_forward(size, num_tokens, work)
    context = size.num_layers * _context_linears(size, work)
    base = blocks.products - context + _around_blocks(size, num_tokens)
    if work.lora_rank is None:
        return StepFlops(products=3 * (base + context), attention=3 * blocks.attention)
    # No gradient goes back into the text and image tokens.
    adapters = size.num_layers * _block_adapters(size, num_tokens, work)
    return StepFlops(products=2 * base + context + 3 * adapters, attention=3 * blocks.attention)


def recomputed_flops(size: DitSize, num_tokens: int, work: Work, policy: str | float) -> StepFlops:
    """What the backward pass computes again of one sample (`memory.activation_checkpointing`).

    Attention is run again under `full` only. A budget is taken for `attention`: 0.5 was no faster (docs/TRAINING.md).
    """
    if policy == "none":
        return StepFlops(products=0.0, attention=0.0)
    forward = _blocks_forward(size, num_tokens, work)
    adapters = size.num_layers * _block_adapters(size, num_tokens, work)
    return StepFlops(
        products=forward.products + adapters, attention=forward.attention if policy == "full" else 0.0
    )


def _blocks_forward(size: DitSize, num_tokens: int, work: Work) -> StepFlops:
    """Forward of all blocks and face blocks, without adapters."""
    layers = size.num_layers
    products = layers * (_block_linears(size, num_tokens) + _context_linears(size, work))
    attention = layers * _attention(size, num_tokens, work)
    if work.has_face_blocks:
        num_face_blocks = -(-layers // FACE_BLOCK_EVERY)
        # A frame's tokens attend to its own motion tokens; keys and values of those few tokens are left out.
        products += num_face_blocks * 4 * num_tokens * size.dim**2
        attention += num_face_blocks * 4 * num_tokens * MOTION_TOKENS_PER_FRAME * size.dim
    return StepFlops(products=products, attention=attention)


def _block_linears(size: DitSize, num_tokens: int) -> float:
    """Forward of the linears that see every token: q, k, v, o, cross-attention's q and o, feed-forward."""
    return 2 * num_tokens * (6 * size.dim**2 + 2 * size.dim * size.ffn_dim)


def _context_linears(size: DitSize, work: Work) -> float:
    """Forward of cross-attention's k and v of text, and of CLIP's tokens where there are any."""
    context = work.text_length + (NUM_CLIP_TOKENS if size.clip_dim is not None else 0)
    return 2 * context * 2 * size.dim**2


def _block_adapters(size: DitSize, num_tokens: int, work: Work) -> float:
    """Forward of LoRA on q, k, v, o of both attentions and on the feed-forward: 2 * tokens * rank * (in + out)."""
    rank = work.lora_rank or 0
    attention = 2 * rank * 2 * size.dim
    return attention * (6 * num_tokens + 2 * work.text_length) + 2 * num_tokens * rank * 2 * (size.dim + size.ffn_dim)


def _attention(size: DitSize, num_tokens: int, work: Work) -> float:
    """Forward of a block's attentions: 4 * queries * keys * C each."""
    keys = num_tokens + work.text_length + (NUM_CLIP_TOKENS if size.clip_dim is not None else 0)
    return 4 * num_tokens * keys * size.dim


def _around_blocks(size: DitSize, num_tokens: int) -> float:
    patch = size.patch_size[0] * size.patch_size[1] * size.patch_size[2]
    return 2 * num_tokens * patch * (size.in_dim + size.out_dim) * size.dim
