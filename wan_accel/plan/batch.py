"""A micro-batch of a bucket as `collate` would make it, without a dataset: shapes and dtypes, no content.

Shapes: B batch, C latent channels, F latent frames, h x w latent pixels, T video frames.
"""

import torch
from torch import Tensor

from wan_accel.draws import Bucket
from wan_accel.models.blocks import NUM_CLIP_TOKENS
from wan_accel.models.dit import animate_size_from_shapes, dit_size_from_shapes
from wan_accel.models.reader import TensorShapes
from wan_accel.models.variants import TEXT_LENGTH, Variant


def micro_batch(
    variant: Variant, shapes: TensorShapes, bucket: Bucket, num_samples: int, *, text_length: int = TEXT_LENGTH
) -> dict[str, Tensor]:
    """Tensors (B, ...) on the current default device in the dtypes of the cache, captions of `text_length` tokens."""
    size = dit_size_from_shapes(shapes.shapes, num_heads=shapes.num_heads)
    stride_t, stride_h, stride_w = variant.vae.stride
    frames = (bucket.num_frames - 1) // stride_t + 1 + variant.reference_frames
    video = (frames, bucket.height // stride_h, bucket.width // stride_w)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(num_samples, *shape, dtype=dtype)

    batch = {
        "latents": empty(size.out_dim, *video),
        "noise": empty(size.out_dim, *video, dtype=torch.float32),
        "text": empty(text_length, size.text_dim),
        "sigma": empty(dtype=torch.float32),
        "weight": empty(dtype=torch.float32),
        "drop_image": empty(dtype=torch.bool),
    }
    if size.in_dim != size.out_dim:
        batch["condition"] = empty(size.in_dim - size.out_dim, *video)
    if size.clip_dim is not None:
        batch["clip_features"] = empty(NUM_CLIP_TOKENS, size.clip_dim)
    if variant.has_animate_adapter:
        animate = animate_size_from_shapes(shapes.shapes)
        batch["pose_latents"] = empty(animate.latent_channels, frames - 1, *video[1:])
        batch["motion_vectors"] = empty(bucket.num_frames, animate.motion_dim, dtype=torch.float32)
    return batch
