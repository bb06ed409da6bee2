"""What a cached condition was made from, so that a clip that was changed in place is noticed. Torch-free.

Two levels: a fingerprint of a row's small columns and the lengths of its large ones, cheap enough to compare for every
clip at every run; and a hash of the bytes that each kind of condition is made of, read only where fingerprints differ.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from wan_accel.data import store

# Columns of a clip that each kind of condition is made of.
_MADE_OF = {
    "video": ("video",),
    "image": ("video",),
    "pose": ("pose_keypoints", "canvas_height", "canvas_width"),
    "reference": ("reference",),
    "face": ("face_video",),
    "known": ("clip_id", "video", "mask", "modes"),
}
_SMALL = (
    "clip_id", "source", "num_frames", "height", "width", "fps", "purpose", "modes", "canvas_height", "canvas_width",
    "quality", "settings_hash",
)  # fmt: skip
_FILES = ("video", "reference", "face_video")  # {bytes, path}


def content_hashes(clip: Mapping[str, Any], kinds: Collection[str]) -> dict[str, str]:
    """Hash what each kind is made of; `clip` is a row read below the types of `datasets` (`data.rows`)."""
    hashes = {}
    for kind in kinds:
        digest = xxhash.xxh64()
        for name in _MADE_OF[kind]:
            digest.update(name.encode() + b"\0")
            digest.update(_bytes_of(clip.get(name)))
        hashes[kind] = digest.hexdigest()
    return hashes


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def fingerprints(parts: Iterable[Path]) -> list[str]:
    """The fingerprint of every row of parts of a clips dataset, in order; no picture, point or video is read."""
    return [found for part in parts for batch in store.batches(part) for found in _of_batch(batch)]


def _of_batch(batch: pa.RecordBatch) -> list[str]:
    names = batch.schema.names
    small = batch.select([name for name in _SMALL if name in names]).to_pylist()
    lengths = {name: pc.binary_length(pc.struct_field(batch[name], "bytes")) for name in _FILES if name in names}
    if "mask" in names:
        lengths["mask"] = pc.binary_length(batch["mask"])
    sizes = zip(*(column.to_pylist() for column in lengths.values()))
    return [
        xxhash.xxh64(json.dumps([row, dict(zip(lengths, size))], sort_keys=True).encode()).hexdigest()
        for row, size in zip(small, sizes)
    ]
