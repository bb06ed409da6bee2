"""Whether a latents folder is of a clips dataset as it is now: clips that are gone since, or were made anew."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wan_accel.data import store
from wan_accel.data.cells import LatentsError
from wan_accel.data.fingerprint import fingerprints
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.rows import Rows
from wan_accel.data.schema import LATENTS_SCHEMA
from wan_accel.listing import first_few

logger = logging.getLogger("wan_accel")
COMPARED = ("clip_id", "num_frames", "height", "width")


def removed_clips(cached: LatentsDataset, clips: Path) -> list[str]:
    """Clips that a latents folder has and its clips dataset does not have any more.

    Raises:
        StoreError: the clips dataset is damaged.
    """
    present = store.ids(clips, "clip_id")
    return [name for name in cached.clip_ids if name not in present]


def warn_of_removed(names: Sequence[str], latents: Path, clips: Path) -> None:
    """Say that clips which are gone will be trained on, and how to leave them out."""
    if not names:
        return
    where = " and ".join(f"clip_id != '{name}'" for name in names[:3])
    logger.warning(
        "data.latents=%s has %d clips that are no longer in data.clips=%s and are trained on (%s): to leave them "
        "out, encode into a new folder, or set data.where, e.g. to %s",
        latents, len(names), clips, first_few(names, 3), where,
    )  # fmt: skip


def rows_of_clips(cached: LatentsDataset, clips: Rows) -> np.ndarray:
    """The row in a clips dataset of every clip of a latents folder, which must be of the clips as they are now.

    Args:
        cached: the latents.
        clips: the clips, with `COMPARED` as light columns.

    Raises:
        LatentsError: clips are gone, or were made anew under their names.
        StoreError: the latents are damaged.
    """
    now = clips.table
    names = pa.array(cached.clip_ids, pa.string())
    rows = pc.index_in(names, value_set=now["clip_id"].combine_chunks())
    if rows.null_count:
        missing = names.filter(rows.is_null())
        raise LatentsError(
            f"data.on_the_fly: data.clips={clips.root} does not have {len(missing)} clips of {cached.root} (the first: "
            f"{missing[0]}): give the dataset that was cached"
        )
    then = Rows(cached.root / "clips", LATENTS_SCHEMA, light=(*COMPARED, "fingerprint")).table
    then = then.take(pc.index_in(names, value_set=then["clip_id"].combine_chunks()))
    now = now.append_column("fingerprint", pa.array(fingerprints(clips.parts), pa.string())).take(rows)
    differs = pc.not_equal(then["fingerprint"], now["fingerprint"])
    if found := list(zip(then.filter(differs).to_pylist(), now.filter(differs).to_pylist())):
        differences = first_few([_difference(*pair) for pair in found], 3, separator="; ")
        raise LatentsError(
            f"data.on_the_fly: {len(found)} clips of data.clips={clips.root} are not those that {cached.root} was made "
            f"of ({differences}): run wan_accel.cache with this recipe, "
            "which encodes them again, or give the dataset that was cached"
        )
    return rows.to_numpy()


def _difference(then: dict, now: dict) -> str:
    def size(row: dict) -> str:
        return f"{row['num_frames']} frames of {row['height']}x{row['width']}"

    if size(then) != size(now):
        return f"{now['clip_id']}: {size(then)} were cached, it has {size(now)}"
    return f"{now['clip_id']}: made anew"
