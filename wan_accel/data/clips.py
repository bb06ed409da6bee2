"""Read a row of the clips dataset: video, mask, faces and points decoded to arrays. Torch-free."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wan_accel.data.schema import unpack_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A decoded clip of T frames. What the row does not have is None.

    frames_rgb: (T, H, W, 3) uint8.
    reference_rgb: (h, w, 3) uint8, the character.
    mask: (T, H, W) bool, True = person, before any dilation.
    faces_rgb: (T, 512, 512, 3) uint8.
    boxes: (T, 5) float32, x1 y1 x2 y2 score in pixels of the video.
    keypoints: (T, 133, 3) float32, x y score in pixels of the video.
    pose_keypoints: (T, 62, 3) float32 in pixels of the canvas, NaN where absent.
    canvas_hw: height and width of that canvas.
    """

    clip_id: str
    frames_rgb: np.ndarray
    reference_rgb: np.ndarray | None
    mask: np.ndarray | None
    faces_rgb: np.ndarray | None
    boxes: np.ndarray | None
    keypoints: np.ndarray | None
    pose_keypoints: np.ndarray | None
    canvas_hw: tuple[int, int]


def load_clip(row: Mapping[str, Any]) -> Clip:
    """Decode everything that a row holds.

    Raises:
        ValueError: a column is damaged, or has another number of frames than the row says; the clip is named.
    """
    clip_id, num_frames = str(row["clip_id"]), int(row["num_frames"])
    height, width = int(row["height"]), int(row["width"])
    try:
        frames = _decode_video(row["video"])
        faces = _decode_video(row.get("face_video"))
        mask: Any = row.get("mask")
        clip = Clip(
            clip_id=clip_id,
            frames_rgb=frames,  # type: ignore[arg-type]
            reference_rgb=_decode_image(row.get("reference")),
            mask=unpack_mask(bytes(mask), (num_frames, height, width)) if _is_present(mask) else None,
            faces_rgb=faces,
            boxes=_array(row.get("boxes"), np.float32),
            keypoints=_array(row.get("keypoints"), np.float32),
            pose_keypoints=_array(row.get("pose_keypoints"), np.float32),
            canvas_hw=(_int(row.get("canvas_height"), height), _int(row.get("canvas_width"), width)),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"clip {clip_id} cannot be decoded: {error}") from error
    _check_lengths(clip, num_frames, (height, width))
    return clip


def _check_lengths(clip: Clip, num_frames: int, hw: tuple[int, int]) -> None:
    if clip.frames_rgb is None:
        raise ValueError(f"clip {clip.clip_id} has no video")
    if clip.frames_rgb.shape != (num_frames, *hw, 3):
        raise ValueError(f"clip {clip.clip_id}: video is {clip.frames_rgb.shape}, its row says {(num_frames, *hw, 3)}")
    for name in ("mask", "faces_rgb", "boxes", "keypoints", "pose_keypoints"):
        value = getattr(clip, name)
        if value is not None and len(value) != num_frames:
            raise ValueError(f"clip {clip.clip_id}: {name} has {len(value)} frames, its row says {num_frames}")


def _is_present(value: Any) -> bool:
    """False for None and for nan, as which `datasets` reads back a null number or array of unknown length."""
    if value is None:
        return False
    return not (isinstance(value, (float, np.floating)) and np.isnan(value)) and not (
        isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind == "f" and np.isnan(value)
    )


def _int(value: Any, default: int) -> int:
    return int(value) if _is_present(value) else default


def _array(value: Any, dtype: type) -> np.ndarray | None:
    return np.asarray(value, dtype=dtype) if _is_present(value) else None


def _decode_image(value: Any) -> np.ndarray | None:
    """A PNG as `datasets` gives it: decoded (PIL or array), or {bytes, path}."""
    from PIL import Image

    if not _is_present(value):
        return None
    if isinstance(value, Mapping):
        if value["bytes"] is None:
            return None
        value = Image.open(io.BytesIO(value["bytes"]))
    image = value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value, dtype=np.uint8))
    return np.asarray(image.convert("RGB"))


def _decode_video(value: Any) -> np.ndarray | None:
    """All frames of an mp4 given as {bytes, path}: (T, H, W, 3) uint8 RGB."""
    if not _is_present(value) or value["bytes"] is None:
        return None
    return decode_mp4(value["bytes"])


def decode_mp4(data: bytes) -> np.ndarray:
    """Decode all frames of a video in memory: (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: no video, or one that is damaged.
    """
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # one for all frames: setting it up costs as much as a frame
    try:
        with av.open(io.BytesIO(data), "r") as container:
            frames = container.decode(video=0)
            return np.stack([reformatter.reformat(frame, format="rgb24").to_ndarray() for frame in frames])
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"the video is damaged ({error})") from None
