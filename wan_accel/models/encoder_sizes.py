"""diffsynth's encoders, built at the sizes that the tensor shapes of a checkpoint show.

Every builder takes the original names without a prefix, builds on the current default device
(`torch.device("meta")` for a skeleton) and raises KeyError if a tensor that fixes a size is missing.
"""

import math
import re

from diffsynth.models.wan_video_image_encoder import VisionTransformer
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_

from wan_accel.models.dit import Shapes, count_blocks

# No tensor shows the heads of the image encoder: ViT-H/14 has 16 (80 wide), and so has every tiny one.
CLIP_HEADS = 16


def build_text_encoder(shapes: Shapes) -> WanTextEncoder:
    """Build umT5; a block's table of relative positions shows its heads."""
    vocab, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return WanTextEncoder(
        vocab=vocab,
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=count_blocks(shapes, "blocks."),
        num_buckets=num_buckets,
    )


def build_vae21(shapes: Shapes) -> VideoVAE_:
    """Build the Wan2.1 VAE. Its stages lie flat: n residual blocks, then (not in the last) a downsampling."""
    dim = shapes["encoder.conv1.weight"][0]
    convs = _first_convs(shapes, r"encoder\.downsamples\.(\d+)\.residual\.2\.weight")
    num_stages = max(convs) - len(convs) + 2  # the last stage has no downsampling
    num_res_blocks = len(convs) // num_stages
    widths = [convs[stage * (num_res_blocks + 1)] for stage in range(num_stages)]
    return VideoVAE_(
        dim=dim,
        z_dim=shapes["conv2.weight"][0],
        dim_mult=[width // dim for width in widths],
        num_res_blocks=num_res_blocks,
    )


def build_vae22(shapes: Shapes) -> VideoVAE38_:
    """Build the Wan2.2 VAE, whose stages are modules; its decoder has a width of its own."""
    dim = shapes["encoder.conv1.weight"][0]
    stages = _first_convs(shapes, r"encoder\.downsamples\.(\d+)\.downsamples\.0\.residual\.2\.weight")
    blocks = _first_convs(shapes, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.2\.weight")
    return VideoVAE38_(
        dim=dim,
        z_dim=shapes["conv2.weight"][0],
        dec_dim=shapes["decoder.head.0.gamma"][0] * dim // stages[0],
        dim_mult=[stages[stage] // dim for stage in sorted(stages)],
        num_res_blocks=len(blocks),
    )


def _first_convs(shapes: Shapes, pattern: str) -> dict[int, int]:
    """Number in the pattern -> output channels of the convolution of that name.

    Raises:
        KeyError: there is none.
    """
    found = {int(match[1]): shape[0] for name, shape in shapes.items() if (match := re.fullmatch(pattern, name))}
    if not found:
        raise KeyError(pattern)
    return found


def build_clip(shapes: Shapes) -> VisionTransformer:
    """Build CLIP's vision tower, square pictures and patches."""
    _, num_tokens, dim = shapes["pos_embedding"]
    patch_size = shapes["patch_embedding.weight"][-1]
    return VisionTransformer(
        image_size=math.isqrt(num_tokens - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        mlp_ratio=shapes["transformer.0.mlp.0.weight"][0] // dim,
        out_dim=shapes["head"][1],
        num_heads=CLIP_HEADS,
        num_layers=count_blocks(shapes, "transformer."),
        activation="gelu",
    )
