"""From a recipe's `data` section to what training draws from: one folder or several, a filter, captions, live kinds."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from wan_accel.data.captions import check_clip_ids, read_captions
from wan_accel.data.collate import MicroBatch, SampleSource
from wan_accel.data.latents import LatentsDataset, list_parts
from wan_accel.data.live import LiveSource, load_hook
from wan_accel.data.mixture import MixedLatents
from wan_accel.models.checkpoint_files import condition_keys
from wan_accel.models.conditioning.live import LiveEncoder
from wan_accel.models.encoders import load_text_encoder, load_vae
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.variants import Variant
from wan_accel.parallel.agreement import check_same_rows, from_main_rank
from wan_accel.parallel.sharded_text import load_sharded_text_encoder
from wan_accel.recipe.schema import Recipe

Live = tuple[SampleSource, Callable[[MicroBatch], MicroBatch]]


def open_source(recipe: Recipe, variant: Variant) -> LatentsDataset | MixedLatents:
    """The cached conditions of a recipe, checked to be whole and made with its weights and settings. Collective.

    A folder may be growing, so rank 0 decides which parts of it there are.

    Raises:
        ValueError: a folder is missing, damaged or stale, lacks what a dropout needs, the captions or the filter do
            not fit, or ranks have other rows; the folder is named.
    """
    data = recipe.data
    captions = read_captions(Path(data.captions)) if data.captions is not None else None
    folders = [part.path for part in data.datasets] or [str(data.latents)]
    listings = from_main_rank(lambda: [list_parts(Path(folder)) for folder in folders])
    datasets = [
        LatentsDataset(Path(folder), where=data.where, captions=captions, variant=variant, listing=listing)
        for folder, listing in zip(folders, listings)
    ]
    if captions is not None:
        check_clip_ids(captions, (name for one in datasets for name in one.all_clip_ids), str(data.captions))
    keys = condition_keys(variant, _checkpoint(recipe), known_variants=recipe.cache.known_variants)
    for one in datasets:
        one.check_keys(keys)
        one.check_nulls(caption_dropout=data.caption_dropout, face_dropout=data.face_dropout)
    for folder, one in zip(folders, datasets):
        check_same_rows(one.digest, folder)
    if not data.datasets:
        return datasets[0]
    weights = [part.weight for part in data.datasets if part.weight is not None]
    mixed = MixedLatents(datasets, weights or None)
    mixed.check_same_keys()
    return mixed


def open_live(
    recipe: Recipe, variant: Variant, cached: LatentsDataset | MixedLatents, device: torch.device
) -> Live | None:
    """What `data.on_the_fly` encodes during training, and with what; None without it. Collective with `text`.

    Raises:
        ValueError: a hook cannot be imported, or clips are missing.
    """
    data, kinds = recipe.data, frozenset(recipe.data.on_the_fly)
    if not kinds:
        return None
    assert isinstance(cached, LatentsDataset) and data.clips is not None
    source = LiveSource(
        cached,
        Path(data.clips),
        kinds=kinds,
        augment=load_hook(data.augment, "data.augment") if data.augment else None,
        augment_caption=load_hook(data.augment_caption, "data.augment_caption") if data.augment_caption else None,
        captions=read_captions(Path(data.captions)) if data.captions is not None else None,
    )
    checkpoint = _checkpoint(recipe)
    load_text = load_sharded_text_encoder if dist.is_initialized() and dist.get_world_size() > 1 else load_text_encoder
    encoder = LiveEncoder(
        load_vae(checkpoint, variant, device=device) if kinds & {"video", "known"} else None,
        load_text(checkpoint, device=device) if "text" in kinds else None,
        encodes_video="video" in kinds,
        reference_frames=variant.reference_frames,
    )
    return source, encoder


def _checkpoint(recipe: Recipe) -> Path:
    return resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
