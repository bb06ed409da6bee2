"""Rows of small clips with every column, for tests of what reads datasets."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.video import encode_mp4
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, QUALITY, clips_features, pack_mask

T, H, W = 9, 96, 64
SETTINGS = {"num_frames": T}


def clip_row(name: str, *, canvas: tuple[int, int] = (H, W), **changes) -> dict:
    """A clip of a red block that moves over grey; `canvas` differs from the video's size in clips for driving."""
    frames = np.full((T, H, W, 3), 128, np.uint8)
    mask = np.zeros((T, H, W), bool)
    for i in range(T):
        mask[i, 30:70, 2 * i : 2 * i + 20] = True
    frames[mask] = 220, 30, 30
    pose = np.full((T, 62, 3), np.nan, np.float32)
    pose[..., 2] = 0
    pose[:, 1], pose[:, 8] = [10, 20, 0.9], [30, 60, 0.9]  # neck to right hip
    faces = np.full((T, 512, 512, 3), 200, np.uint8)
    return {
        "schema": CLIPS_SCHEMA, "clip_id": name, "caption": "a block moves", "num_frames": T,
        "purpose": "train" if canvas == (H, W) else "drive",
        "height": H, "width": W, "fps": 10.0, "timestamps": [i / 10 for i in range(T)],
        "source": {"path": "x.mp4", "sha256": "0" * 64, "start_seconds": 0.0, "end_seconds": 0.9, "track": 0},
        "video": {"bytes": encode_mp4(frames, 10.0)[0], "path": None},
        "reference": {"bytes": png((20, 90, 20), canvas), "path": None},
        "reference_source": {"kind": "frame", "seconds": 0.0}, "modes": ["animation"],
        "boxes": np.tile(np.float32([0, 30, 20, 70, 1]), (T, 1)), "keypoints": np.zeros((T, 133, 3), np.float32),
        "pose_keypoints": pose, "canvas_height": canvas[0], "canvas_width": canvas[1],
        "face_boxes": np.tile(np.int32([0, 30, 20, 50]), (T, 1)),
        "face_video": {"bytes": encode_mp4(faces, 10.0)[0], "path": None}, "mask": pack_mask(mask),
        "quality": dict.fromkeys(QUALITY, 0.5), "settings_hash": store.settings_hash(SETTINGS),
        "provenance": json.dumps({"settings": SETTINGS}), **changes,
    }  # fmt: skip


def png(color, hw) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", hw[::-1], color).save(picture, "PNG")
    return picture.getvalue()


def write_dataset(output: Path, *parts, settings=None, features=None, journal=None) -> Path:
    """A dataset whose parts hold these rows; `journal` is that of the last part."""
    store.claim_output(output, schema=CLIPS_SCHEMA, settings=settings or {})
    with store.PartWriter(output, writer="writer0", features=features or clips_features()) as writer:
        for number, rows in enumerate(parts):
            for row in rows:
                writer.write(row)
            writer.flush(journal if number == len(parts) - 1 else None)
    return output
