"""From a recipe's `data` section to what training draws from: one folder or several, a filter, captions."""

from pathlib import Path

from wan_accel.data.captions import check_clip_ids, read_captions
from wan_accel.data.latents import LatentsDataset, list_parts
from wan_accel.data.mixture import MixedLatents
from wan_accel.models.checkpoint_files import condition_keys
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.variants import Variant
from wan_accel.parallel.agreement import check_same_rows, from_main_rank
from wan_accel.recipe.schema import Recipe


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
    keys = condition_keys(variant, checkpoint_of(recipe), known_variants=recipe.cache.known_variants)
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


def checkpoint_of(recipe: Recipe) -> Path:
    """The local folder of `model.checkpoint`; see `resolve_checkpoint`."""
    return resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
