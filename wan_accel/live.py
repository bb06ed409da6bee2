"""Conditions that training encodes itself: the clips and hooks that a recipe names, and their encoders."""

from pathlib import Path

import torch
import torch.distributed as dist

from wan_accel.data.captions import read_captions
from wan_accel.data.hooks import load_hook
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.live import LiveSource
from wan_accel.data.mixture import MixedLatents
from wan_accel.models.checkpoint_files import check_encoder_files
from wan_accel.models.conditioning.live import LiveEncoder
from wan_accel.models.encoders import load_text_encoder, load_vae
from wan_accel.models.variants import Variant
from wan_accel.parallel.sharded_text import load_sharded_text_encoder
from wan_accel.recipe.schema import Recipe
from wan_accel.sources import checkpoint_of


def open_live(recipe: Recipe, variant: Variant, cached: LatentsDataset | MixedLatents) -> LiveSource | None:
    """What `data.on_the_fly` encodes during training; None without it. It is checked as far as no encoder is needed.

    Raises:
        ValueError: a hook cannot be imported or used, clips are missing or others than those that were cached, or the
            checkpoint lacks an encoder.
    """
    data = recipe.data
    if not data.on_the_fly:
        return None
    assert isinstance(cached, LatentsDataset) and data.clips is not None
    check_encoder_files(checkpoint_of(recipe), variant, kinds=data.on_the_fly)
    source = LiveSource(
        cached,
        Path(data.clips),
        kinds=data.on_the_fly,
        augment=load_hook(data.augment, "data.augment") if data.augment else None,
        augment_caption=load_hook(data.augment_caption, "data.augment_caption") if data.augment_caption else None,
        captions=read_captions(Path(data.captions)) if data.captions is not None else None,
    )
    source.try_first()
    return source


def load_live_encoder(recipe: Recipe, variant: Variant, device: torch.device) -> LiveEncoder:
    """The networks that `data.on_the_fly` needs. Collective with `text`.

    Raises:
        CheckpointError: a file is damaged.
    """
    kinds, checkpoint = frozenset(recipe.data.on_the_fly), checkpoint_of(recipe)
    load_text = load_sharded_text_encoder if dist.is_initialized() and dist.get_world_size() > 1 else load_text_encoder
    return LiveEncoder(
        load_vae(checkpoint, variant, device=device) if kinds & {"video", "known"} else None,
        load_text(checkpoint, device=device) if "text" in kinds else None,
        encodes_video="video" in kinds,
        reference_frames=variant.reference_frames,
    )
