"""The pictures that Wan2.2's and DiffSynth's tools read of a clip, as files in memory."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from preprocessing.encoding import encode_mp4
from preprocessing.mask_growth import WAN_GROWTH, MaskGrowth
from preprocessing.masks import blacken
from wan_accel.data.clips import load_clip
from wan_accel.data.skeleton import draw_poses

POSE, FACE, REFERENCE = "src_pose.mp4", "src_face.mp4", "src_ref.png"
BACKGROUND, MASK = "src_bg.mp4", "src_mask.mp4"
# Names as `generate.py --task animate-14B --src_root_path` looks for them, and the columns that they are made from.
FILES_OF_MODE: dict[str, dict[str, tuple[str, ...]]] = {
    "animation": {POSE: ("pose_keypoints",), FACE: ("face_video",), REFERENCE: ("reference",)},
    "replacement": {
        POSE: ("pose_keypoints",), FACE: ("face_video",), REFERENCE: ("reference",), BACKGROUND: ("video", "mask"),
        MASK: ("mask",),
    },
}  # fmt: skip


def needed_columns(modes: list[str]) -> dict[str, tuple[str, ...]]:
    """File -> columns that it is made from, for a clip that serves `modes`."""
    return {name: columns for mode in modes for name, columns in FILES_OF_MODE[mode].items()}


def wan_files(row: Mapping[str, Any], growth: MaskGrowth = WAN_GROWTH) -> dict[str, bytes]:
    """Make the files of the clip's modes: name -> content. Every frame of the clip is in every video, at its rate.

    Poses are drawn on the canvas; faces are the stored video, unchanged; the mask is 0 or 255 in three equal
    channels, lossless; the background is the video with the grown mask black.

    Args:
        row: a row with `reference` undecoded ({bytes, path}).
        growth: what masks and backgrounds are grown by.

    Raises:
        ValueError: the row cannot be decoded; the clip is named.
    """
    clip, fps = load_clip(row), float(row["fps"])
    assert clip.pose_keypoints is not None
    files = {
        POSE: encode_mp4(draw_poses(clip.pose_keypoints, clip.canvas_hw), fps)[0],
        FACE: row["face_video"]["bytes"],
        REFERENCE: row["reference"]["bytes"],
    }
    if "replacement" in row["modes"]:
        assert clip.mask is not None
        grown = growth(clip.mask)
        white = np.repeat(grown[..., None].astype(np.uint8) * 255, 3, axis=-1)
        files[BACKGROUND] = encode_mp4(blacken(clip.frames_rgb, grown), fps)[0]
        files[MASK] = encode_mp4(white, fps, min_psnr_db=math.inf)[0]
    return files
