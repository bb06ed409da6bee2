"""What caching a clip costs, by its variant's conditions: bytes of every column, and videos through the VAE."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from wan_accel.models.variants import Conditioning, Variant

BYTES_STORED = 2  # bfloat16
_CLIP_TOKENS, _MOTION_DIM, _BYTES_OF_MOTION = 257, 512, 4


class ClipSize(NamedTuple):
    """Bytes of the latents of a whole clip and of one picture, the clip's frames, and known variants a clip."""

    video: int
    picture: int
    num_frames: int
    known_variants: int


# Columns of each condition, and their bytes. A fused first frame is part of the latents.
_COLUMNS: dict[Conditioning, tuple[str, Callable[[ClipSize], int]]] = {
    "reference": ("reference_latents", lambda size: size.picture),
    "pose": ("pose_latents", lambda size: size.video),
    "face": ("motion_vectors", lambda size: size.num_frames * _MOTION_DIM * _BYTES_OF_MOTION),
    "known": ("known (at most)", lambda size: size.video * size.known_variants),
    "clip": ("clip_features", lambda size: _CLIP_TOKENS * 1280 * BYTES_STORED),
    "first_frame": ("image_latents", lambda size: size.video),
}
# Videos as long as the clip that each condition sends through the VAE.
_VIDEOS: dict[Conditioning, Callable[[int], int]] = {
    "pose": lambda known_variants: 1,
    "known": lambda known_variants: known_variants,
    "first_frame": lambda known_variants: 1,
}


# What each kind of condition, as the cache keys it, is made of.
_CONDITIONS: dict[str, tuple[Conditioning, ...]] = {
    "pose": ("pose",), "reference": ("reference", "clip"), "face": ("face",), "known": ("known",),
    "image": ("first_frame", "clip"),
}  # fmt: skip


def _conditions(variant: Variant, kinds: Collection[str]) -> list[Conditioning]:
    wanted = {condition for kind in kinds for condition in _CONDITIONS.get(kind, ())}
    return [condition for condition in variant.conditioning if condition in wanted]


def bytes_by_column(
    variant: Variant, shape: tuple[int, int, int], *, kinds: Collection[str], known_variants: int
) -> dict[str, int]:
    """Bytes that a clip of `shape` (frames, height, width in pixels) takes in the columns of some kinds."""
    frames, height, width = shape
    stride_t, stride_h, stride_w = variant.vae.stride
    picture = (height // stride_h) * (width // stride_w) * variant.vae.latent_channels * BYTES_STORED
    size = ClipSize(((frames - 1) // stride_t + 1) * picture, picture, frames, known_variants)
    columns = [_COLUMNS[condition] for condition in _conditions(variant, kinds)]
    return {"latents": size.video if "video" in kinds else 0, **{name: count(size) for name, count in columns}}


def videos_per_clip(variant: Variant, *, kinds: Collection[str], known_variants: int) -> int:
    """Videos as long as the clip that go through the VAE for some kinds, its own included."""
    found = [condition for condition in _conditions(variant, kinds) if condition in _VIDEOS]
    return int("video" in kinds) + sum(_VIDEOS[condition](known_variants) for condition in found)
