"""Bytes that the tensors of stored rows take, read off the offsets of a part: no tensor is read."""

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The columns of the clips part that each kind of condition fills.
_COLUMNS = {
    "video": ("latents",), "pose": ("pose_latents",), "reference": ("reference_latents", "clip_features"),
    "face": ("motion_vectors",), "known": ("known",), "image": ("image_latents", "clip_features"),
}  # fmt: skip


def bytes_of_rows(batch: pa.RecordBatch, kinds: Mapping[int, Collection[str]]) -> int:
    """Bytes of the tensors of some kinds in some rows of a batch of the clips part."""
    columns = {row: {name for kind in some for name in _COLUMNS[kind]} for row, some in kinds.items()}
    sizes = {name: _sizes(batch[name]) for name in {name for names in columns.values() for name in names}}
    return sum(int(sizes[name][row]) for row, names in columns.items() for name in names)


def _sizes(column: pa.Array) -> np.ndarray:
    """Of each row: bytes of its tensor, or of the tensors of its list of known variants."""
    if not pa.types.is_list(column.type):
        return _lengths(pc.struct_field(column, "data"))
    sizes = _lengths(pc.struct_field(column.flatten(), ["latents", "data"]))
    return np.bincount(pc.list_parent_indices(column).to_numpy(), weights=sizes, minlength=len(column))


def _lengths(data: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.binary_length(data), 0).to_numpy(zero_copy_only=False)
