"""Rows that are hard to carry, and a comparison that sees every bit of them."""

import json

import numpy as np
import pyarrow as pa
from tiny_clips import clip_row


def varied_rows() -> list[dict]:
    """Rows that differ in what is null, nan, empty and negative zero."""
    provenance = {"tools": {"av": "18.1"}, "settings": {"num_frames": 5, "caption": "|"}}
    told = {"provenance": json.dumps(provenance), "settings_hash": "abc", "quality": {"blur": 3.5, "motion": -0.0}}
    return [
        clip_row(0, **told, keypoints_3d=np.full((5, 133, 4), np.nan, np.float32)),
        clip_row(1, **told, mask=None, boxes=None, face_video=None, face_boxes=None, modes=["animation"]),
        clip_row(2, reference=None, reference_source=None, quality=None, caption="", timestamps=[]),
        clip_row(3, num_frames=9, pose_keypoints=np.full((9, 62, 3), -0.0, np.float32)),
        clip_row(4, caption="ein Platz \u2028 mit Zeilen\n", modes=[]),
    ]


def bits(column) -> object:
    """A column's values with their bits and nulls, down to the last level, comparable with ==."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    valid = array.is_valid().to_pylist()
    if pa.types.is_struct(array.type):
        return valid, [bits(part) for part in array.flatten()]
    if pa.types.is_list(array.type):
        return valid, array.value_lengths().to_pylist(), bits(array.flatten())
    if pa.types.is_floating(array.type):
        return valid, array.drop_null().to_numpy(zero_copy_only=False).tobytes()
    return valid, array.to_pylist()


def assert_same_bits(found, expected) -> None:
    found, expected = found.data.table, expected.data.table
    assert found.schema.equals(expected.schema)
    different = [name for name in expected.column_names if bits(found[name]) != bits(expected[name])]
    assert different == []
