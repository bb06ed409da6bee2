"""A row of the clips dataset, put together from what was measured."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.types import Float, Frames, Int
from preprocessing.video import VideoInfo
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, pack_mask

_PNG_LEVEL = 3  # a third of the time of zlib's usual 6, and 4 % more bytes
Encoded = tuple[bytes, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Origin:
    """Where clips come from: the path or URL as given, what `probe` found, the caption, the run's settings."""

    path: str
    info: VideoInfo
    caption: str
    described: dict[str, Any]
    tools: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredPerson:
    """What was measured of the person of a clip of T frames; the columns of the same names."""

    boxes: Float
    keypoints: Float
    keypoints_3d: Float | None
    face_boxes: Int | None
    mask: np.ndarray


def plain_row(
    origin: Origin,
    name: str,
    *,
    seconds: Float,
    fps: float,
    hw: tuple[int, int],
    track: int,
    videos: dict[str, Encoded | None],
    quality: dict[str, float | None],
) -> dict[str, Any]:
    """The columns that every clip has, and those of `videos`, by their names."""
    provenance = {
        "tools": origin.tools, "settings": origin.described, "source_fps": origin.info.fps,
        "source_hw": [origin.info.height, origin.info.width],
        **{f"{column}_encoder": video and video[1] for column, video in videos.items()},
    }  # fmt: skip
    return {
        "schema": CLIPS_SCHEMA,
        "clip_id": name,
        "source": {
            "path": origin.path, "sha256": origin.info.sha256, "start_seconds": float(seconds[0]),
            "end_seconds": float(seconds[-1]) + 1 / fps, "track": track,
        },
        "caption": origin.caption,
        "num_frames": len(seconds),
        "height": hw[0],
        "width": hw[1],
        "fps": fps,
        "timestamps": seconds.tolist(),
        **{column: video and {"bytes": video[0], "path": None} for column, video in videos.items()},
        "quality": quality,
        "settings_hash": store.settings_hash(origin.described),
        "provenance": json.dumps(provenance),
    }  # fmt: skip


def person_columns(person: MeasuredPerson) -> dict[str, Any]:
    """The columns of the person, but for the video of the face."""
    return {
        "boxes": person.boxes.astype(np.float32),
        "keypoints": person.keypoints.astype(np.float32),
        "keypoints_3d": None if person.keypoints_3d is None else person.keypoints_3d.astype(np.float32),
        "face_boxes": person.face_boxes,
        "mask": pack_mask(person.mask),
    }


def reference_columns(
    picture_rgb: Frames, *, kind: str, seconds: float | None, pose: Float, canvas_hw: tuple[int, int], purpose: str
) -> dict[str, Any]:
    """The columns that are known when the track is over."""
    return {
        "reference": {"bytes": png(picture_rgb), "path": None},
        "reference_source": {"kind": kind, "seconds": seconds},
        "purpose": purpose,
        "modes": ["animation", "replacement"] if purpose == "train" else ["animation"],
        "pose_keypoints": pose.astype(np.float32),
        "canvas_height": canvas_hw[0],
        "canvas_width": canvas_hw[1],
    }


def png(picture_rgb: Frames) -> bytes:
    """Encode (H, W, 3) losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(picture_rgb).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()
