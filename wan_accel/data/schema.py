"""The data contract: names, features and encodings of the clips and latents datasets. Torch-free."""

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Features

CLIPS_SCHEMA = "wan-accel/clips@1"
LATENTS_SCHEMA = "wan-accel/latents@1"
NUM_WHOLEBODY_POINTS = 133
NUM_POSE_POINTS = 62
QUALITY = (
    "mean_keypoint_score", "visible_share", "hand_score", "face_size", "mask_area_mean", "mask_area_jitter", "motion",
    "luma_change", "blur", "track_switches",
)  # fmt: skip
# Kinds of conditions; `text` is of the text part.
KINDS = ("text", "video", "pose", "reference", "face", "known", "image")
# Of the null part: the kind of condition that each of its rows stands in for.
NULL_KINDS = {"empty_prompt": "text", "negative_prompt": "text", "face": "face", "animation_known": "video"}
# Animate's columns; datasets for text- and image-to-video have the schema without them.
ANIMATE_COLUMNS = (
    "reference", "reference_source", "purpose", "modes", "boxes", "keypoints", "keypoints_3d", "pose_keypoints",
    "canvas_height", "canvas_width", "face_boxes", "face_video", "mask",
)  # fmt: skip


class SchemaError(ValueError):
    """A dataset that this version cannot read."""


def check_schema(found: str | None, expected: str, where: str) -> None:
    """Refuse rows of another kind or major version.

    Raises:
        SchemaError: what was found, what was expected, where.
    """
    if found != expected:
        raise SchemaError(
            f"{where} has schema {found!r}, expected {expected!r}: make it again with this version of wan-accel, or "
            "install the version that wrote it"
        )


def clips_features(*, animate: bool = True) -> "Features":
    """Columns of `wan-accel/clips@1`, one row a clip. Absent values are null.

    `keypoints` are pixels of `video`, `pose_keypoints` pixels of the canvas (`canvas_height` x `canvas_width`): the
    reference's size for `drive` clips, that of `video` otherwise. `keypoints_3d` (x, y, z, score) is null where the
    pose network gives no depth.
    """
    from datasets import Array2D, Array3D, Features, Image, Sequence, Value, Video

    columns: dict[str, Any] = {
        "schema": Value("string"),
        "clip_id": Value("string"),
        "source": {
            "path": Value("string"), "sha256": Value("string"), "start_seconds": Value("float64"),
            "end_seconds": Value("float64"), "track": Value("int32"),
        },
        "caption": Value("string"),
        "num_frames": Value("int32"),
        "height": Value("int32"),
        "width": Value("int32"),
        "fps": Value("float64"),
        "timestamps": Sequence(Value("float64")),
        "video": Video(decode=False),
        "reference": Image(),
        "reference_source": {"kind": Value("string"), "seconds": Value("float64")},
        "purpose": Value("string"),
        "modes": Sequence(Value("string")),
        "boxes": Array2D((None, 5), "float32"),
        "keypoints": Array3D((None, NUM_WHOLEBODY_POINTS, 3), "float32"),
        "keypoints_3d": Array3D((None, NUM_WHOLEBODY_POINTS, 4), "float32"),
        "pose_keypoints": Array3D((None, NUM_POSE_POINTS, 3), "float32"),
        "canvas_height": Value("int32"),
        "canvas_width": Value("int32"),
        "face_boxes": Array2D((None, 4), "int32"),
        "face_video": Video(decode=False),
        "mask": Value("binary"),
        "quality": {name: Value("float32") for name in QUALITY},
        "settings_hash": Value("string"),
        "provenance": Value("string"),
    }  # fmt: skip
    return Features({name: kind for name, kind in columns.items() if animate or name not in ANIMATE_COLUMNS})


def tensor_feature() -> dict[str, Any]:
    """A tensor of any dtype and shape: bytes in C order, little endian; bfloat16 stays bfloat16."""
    from datasets import Sequence, Value

    return {"dtype": Value("string"), "shape": Sequence(Value("int64")), "data": Value("binary")}


def latents_features() -> "Features":
    """Columns of the `clips` part of `wan-accel/latents@1`; what a variant does not need is null.

    keys: what each kind of condition was made with (`condition_keys`); that of texts is in the text part.
    fingerprint, content: what of the clip they were made from (`data.fingerprint`).
    """
    from datasets import Features, Sequence, Value

    known = {
        "mode": Value("string"), "guidance_frames": Value("int32"), "mask_kernel": Value("int32"),
        "mask_iterations": Value("int32"), "mask_columns": Value("int32"), "mask_rows": Value("int32"),
        "latents": tensor_feature(), "mask_bits": Value("binary"),
    }  # fmt: skip
    return Features(
        {
            "schema": Value("string"), "clip_id": Value("string"), "source_sha256": Value("string"),
            "caption": Value("string"), "caption_id": Value("string"), "num_frames": Value("int32"),
            "height": Value("int32"), "width": Value("int32"), "fps": Value("float64"),
            "modes": Sequence(Value("string")), "latents": tensor_feature(), "reference_latents": tensor_feature(),
            "pose_latents": tensor_feature(), "clip_features": tensor_feature(), "motion_vectors": tensor_feature(),
            "image_latents": tensor_feature(), "known": [known], "num_known": Value("int32"),
            "keys": {name: Value("string") for name in KINDS}, "fingerprint": Value("string"),
            "content": {name: Value("string") for name in KINDS},
            "quality": {name: Value("float32") for name in QUALITY},
        }
    )  # fmt: skip


def text_features() -> "Features":
    """Columns of the `text` part: a row a distinct caption, `embeddings` (L, text_dim) trimmed to its length."""
    from datasets import Features, Value

    columns = {name: Value("string") for name in ("schema", "caption_id", "caption", "key")}
    return Features({**columns, "embeddings": tensor_feature()})


def null_features() -> "Features":
    """Columns of the `null` part: what dropout and guidance need. `shape` is e.g. 21x448x256, or empty."""
    from datasets import Features, Value

    columns = {name: Value("string") for name in ("schema", "kind", "shape", "key")}
    return Features({**columns, "tensor": tensor_feature()})


def pack_mask(mask: np.ndarray) -> bytes:
    """Pack a mask (T, H, W) of 0 and 1 or bool losslessly: zlib of `numpy.packbits`."""
    return zlib.compress(np.packbits(mask.astype(bool)).tobytes(), 6)


def unpack_mask(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `pack_mask`: bool of `shape`.

    Raises:
        ValueError: the bytes are damaged or hold another number of pixels.
    """
    try:
        # `with_format("numpy")` of datasets 5.2 strips zero bytes from the end of a binary column: the checksum may
        # lose up to its 4. Zeros after a whole stream are ignored, so they can always be given back.
        bits = np.frombuffer(zlib.decompress(data + bytes(4)), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"the mask is damaged ({error})") from None
    size = int(np.prod(shape))
    if len(bits) != -(-size // 8):
        raise ValueError(f"the mask holds {len(bits) * 8} pixels, expected {size} for shape {tuple(shape)}")
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)


def clip_id(stem: str, sha256: str, start_seconds: float, track: int) -> str:
    """`<stem>-<first 8 of the source's sha256>-<start_ms>-<track>`; unsafe characters of the stem become `_`."""
    safe = re.sub(r"[^\w.]+", "_", stem)
    return f"{safe}-{sha256[:8]}-{round(start_seconds * 1000)}-{track}"
