"""Videos of clips with everything that was found drawn over the frames, small enough for a browser."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from preprocessing.pose import pose62
from preprocessing.types import Float, Frames
from wan_accel.data.clips import Clip
from wan_accel.data.skeleton import draw_pose

LONG_SIDE = 480
MASK_COLOR = (230, 40, 90)
_PERSON_COLOR, _FACE_COLOR, _SHADE = (255, 196, 0), (0, 220, 255), (20, 20, 20)
_TINT = 0.35
# Without lookahead: with it, x264's fast code gives the same frames other bytes from time to time.
_BROWSER_H264 = {
    "crf": "24", "preset": "veryfast", "threads": "1", "flags": "+bitexact", "x264-params": "rc-lookahead=0:mbtree=0",
}  # fmt: skip
_BT601, _LIMITED_RANGE = 6, 1  # numbers of ITU-T H.273


def overlay_frames(clip: Clip, row: Mapping[str, Any], *, long_side: int = LONG_SIDE) -> Frames:
    """Draw mask, skeleton, face box and person's box with track number: (T, h, w, 3), even sides for H.264.

    The skeleton is the stored one where the canvas is the video's; a retargeted one (purpose drive) fits another
    picture, so the measured points are drawn instead.
    """
    height, width = clip.frames_rgb.shape[1:3]
    scale = min(1.0, long_side / max(height, width))
    size = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
    scale_xy = np.array([size[0] / width, size[1] / height])
    poses, faces = _poses(clip, row, scale_xy), row.get("face_boxes")
    frames = np.empty((len(clip.frames_rgb), size[1], size[0], 3), np.uint8)
    for i, frame in enumerate(clip.frames_rgb):
        frames[i] = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        if clip.mask is not None:
            _tint(frames[i], clip.mask[i])
        if poses is not None:
            _lay_over(frames[i], draw_pose(poses[i], (size[1], size[0])))
        if isinstance(faces, list | np.ndarray):
            _box(frames[i], np.array(faces[i]).reshape(2, 2) * scale_xy, _FACE_COLOR, "")
        if clip.boxes is not None and clip.boxes[i, 4] > 0:
            label = f"track {row['source']['track']}  {clip.boxes[i, 4]:.2f}"
            _box(frames[i], clip.boxes[i, :4].reshape(2, 2) * scale_xy, _PERSON_COLOR, label)
    return frames


def _poses(clip: Clip, row: Mapping[str, Any], scale_xy: Float) -> Float | None:
    """(T, 62, 3) points in pixels of the overlay."""
    hw = (clip.frames_rgb.shape[1], clip.frames_rgb.shape[2])
    points = clip.pose_keypoints
    if row.get("purpose") == "drive" or points is None:
        points = None if clip.keypoints is None else pose62(clip.keypoints, hw)
    return None if points is None else np.concatenate([points[..., :2] * scale_xy, points[..., 2:]], axis=-1)


def _tint(frame: Frames, mask: np.ndarray) -> None:
    small = cv2.resize(mask.astype(np.uint8), (frame.shape[1], frame.shape[0]), interpolation=cv2.INTER_NEAREST) > 0
    frame[small] = (frame[small] * (1 - _TINT) + np.array(MASK_COLOR) * _TINT).astype(np.uint8)


def _lay_over(frame: Frames, drawing: Frames) -> None:
    """Put a drawing on black over a frame, its lines a pixel wider: in a small picture they are hairlines."""
    drawing = cv2.dilate(drawing, np.ones((2, 2), np.uint8)).astype(np.uint8, copy=False)
    drawn = drawing.any(axis=2)
    frame[drawn] = drawing[drawn]


def _box(frame: Frames, corners_xy: Float, color: tuple[int, int, int], label: str) -> None:
    (x1, y1), (x2, y2) = corners_xy.round().astype(int).tolist()
    cv2.rectangle(frame, (x1, y1), (x2, y2), color, 2)
    if label:
        (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
        # Inside the picture, also where the box reaches beyond it.
        left, bottom = min(max(x1, 0), max(frame.shape[1] - width - 6, 0)), max(y1, height + 8)
        cv2.rectangle(frame, (left, bottom - height - 8), (left + width + 6, bottom), color, -1)
        cv2.putText(frame, label, (left + 3, bottom - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _SHADE, 1, cv2.LINE_AA)


def write_browser_mp4(path: Path, frames_rgb: Frames, fps: float) -> None:
    """Write (T, h, w, 3) frames of even sides for looking at: H.264 4:2:0, which every browser and phone plays.

    The dataset's own videos are 4:4:4 of high quality: larger, and not for every player.
    """
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1_000_000)
        stream = container.add_stream("libx264", rate=rate, options=_BROWSER_H264)
        stream.height, stream.width = frames_rgb.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        reformatter = VideoReformatter()
        for frame_rgb in frames_rgb:
            frame = av.VideoFrame.from_ndarray(frame_rgb, format="rgb24")
            container.mux(stream.encode(reformatter.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode())
