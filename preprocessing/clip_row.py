"""A row of the clips dataset, put together from what was measured."""

import io
import json
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.types import Float, Frames, Int
from preprocessing.video import VideoInfo
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, pack_mask

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
    face_video: "Future[Encoded] | None"
    mask: np.ndarray


def plain_row(
    origin: Origin,
    name: str,
    *,
    seconds: Float,
    fps: float,
    hw: tuple[int, int],
    track: int,
    video: Encoded,
    quality: dict[str, float | None],
) -> dict[str, Any]:
    """The columns that every clip has."""
    data, encoder = video
    provenance = {
        "tools": origin.tools, "settings": origin.described, "video_encoder": encoder, "source_fps": origin.info.fps,
        "source_hw": [origin.info.height, origin.info.width],
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
        "video": {"bytes": data, "path": None},
        "quality": quality,
        "settings_hash": store.settings_hash(origin.described),
        "provenance": json.dumps(provenance),
    }  # fmt: skip


def person_columns(person: MeasuredPerson, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the person, and the row's provenance with the face video's encoder."""
    data, encoder = person.face_video.result() if person.face_video else (None, None)
    provenance = {**json.loads(row["provenance"]), "face_video_encoder": encoder}
    return {
        "boxes": person.boxes.astype(np.float32),
        "keypoints": person.keypoints.astype(np.float32),
        "keypoints_3d": None if person.keypoints_3d is None else person.keypoints_3d.astype(np.float32),
        "face_boxes": person.face_boxes,
        "face_video": {"bytes": data, "path": None} if data is not None else None,
        "mask": pack_mask(person.mask),
        "provenance": json.dumps(provenance),
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
    Image.fromarray(picture_rgb).save(buffer, "PNG")
    return buffer.getvalue()
