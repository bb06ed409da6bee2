"""A small clips dataset on disk: noise-free videos of a square that moves, with everything Animate needs."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.video import encode_mp4
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, clips_features, pack_mask


def square_video(num_frames: int, hw: tuple[int, int], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) of a square moving over a smooth ground, and its mask (T, H, W)."""
    rng = np.random.default_rng(seed)
    height, width = hw
    ground = np.linspace(*rng.integers(40, 200, (2, 3)), height * width).reshape(height, width, 3)
    frames = np.repeat(ground[None], num_frames, axis=0).astype(np.uint8)
    mask = np.zeros((num_frames, height, width), bool)
    for t in range(num_frames):
        mask[t, 12:28, 4 + t : 16 + t] = True
    frames[mask] = rng.integers(0, 255, 3)
    return frames, mask


def clip_row(number: int, *, num_frames: int = 5, hw: tuple[int, int] = (48, 32), **changes: Any) -> dict[str, Any]:
    """A row of the clips dataset; `changes` replace columns."""
    frames, mask = square_video(num_frames, hw, seed=number)
    pose = np.full((num_frames, 62, 3), np.nan, np.float32)
    for t in range(num_frames):
        pose[t, :8] = [[8 + t + joint, 12 + 2 * joint, 0.9] for joint in range(8)]
    faces = np.repeat(frames[:, 8:24, :16], 32, axis=1).repeat(32, axis=2)
    return {
        "schema": CLIPS_SCHEMA,
        "clip_id": f"square{number}",
        "source": {
            "path": f"{number}.mp4", "sha256": hashlib.sha256(str(number).encode()).hexdigest(), "start_seconds": 0.0,
            "end_seconds": 1.0, "track": 0,
        },
        "caption": f"a square moves, number {number % 2}",
        "num_frames": num_frames, "height": hw[0], "width": hw[1], "fps": 16.0,
        "timestamps": [t / 16 for t in range(num_frames)],
        "video": {"bytes": encode_mp4(frames, 16)[0], "path": None},
        "reference": {"bytes": _png(frames[-1]), "path": None},
        "reference_source": {"kind": "frame", "seconds": 0.0},
        "purpose": "train", "modes": ["animation", "replacement"],
        "boxes": np.tile(np.float32([4, 12, 16, 28, 0.9]), (num_frames, 1)),
        "keypoints": np.zeros((num_frames, 133, 3), np.float32),
        "pose_keypoints": pose,
        "canvas_height": hw[0], "canvas_width": hw[1],
        "face_boxes": np.tile(np.int32([0, 8, 16, 24]), (num_frames, 1)),
        "face_video": {"bytes": encode_mp4(faces, 16)[0], "path": None},
        "mask": pack_mask(mask),
        **changes,
    }  # fmt: skip


def write_clips(root: Path, rows: list[dict[str, Any]], *, settings: dict[str, Any] | None = None) -> Path:
    """Write rows as `wan-preprocess` does."""
    store.claim_output(root, schema=CLIPS_SCHEMA, settings=settings or {"made by": "a test"})
    animate = "pose_keypoints" in rows[0]
    with store.PartWriter(root, writer="writer0", features=clips_features(animate=animate)) as writer:
        for row in rows:
            writer.write(row)
    return root


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
