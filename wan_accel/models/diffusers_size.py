"""The arguments of diffusers' Wan transformers for a checkpoint of any size, to see whether its loader takes a LoRA."""

from typing import Any

from wan_accel.models.dit import FACE_BLOCK_EVERY, animate_size_from_shapes, dit_size_from_shapes
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import Variant


def diffusers_arguments(variant: Variant, reader: CheckpointReader) -> tuple[str, dict[str, Any]]:
    """The name of the class in diffusers and what it is made with (diffusers 0.42, transformer_wan*.py)."""
    size = dit_size_from_shapes(reader.shapes, num_heads=reader.num_heads)
    arguments: dict[str, Any] = {
        "patch_size": size.patch_size,
        "num_attention_heads": size.num_heads,
        "attention_head_dim": size.head_dim,
        "in_channels": size.in_dim,
        "out_channels": size.out_dim,
        "text_dim": size.text_dim,
        "freq_dim": size.freq_dim,
        "ffn_dim": size.ffn_dim,
        "num_layers": size.num_layers,
        "eps": size.eps,
        "image_dim": size.clip_dim,
        "added_kv_proj_dim": size.dim if size.clip_dim is not None else None,
    }
    if not variant.has_animate_adapter:
        return "WanTransformer3DModel", arguments
    animate = animate_size_from_shapes(reader.shapes)
    channels = {str(512 >> stage): width for stage, width in enumerate(animate.motion_channels)}
    return "WanAnimateTransformer3DModel", {
        **arguments,
        "latent_channels": animate.latent_channels,
        "motion_encoder_channel_sizes": channels,
        "motion_style_dim": animate.motion_dim,
        "motion_dim": animate.num_motion_directions,
        "motion_encoder_dim": animate.motion_dim,
        "face_encoder_hidden_dim": animate.face_width,
        "face_encoder_num_heads": animate.num_face_heads,
        "inject_face_latents_blocks": FACE_BLOCK_EVERY,
    }
