"""What the videos, points and pictures of a clip must keep to, given that its row's own numbers are right."""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.face import FACE_SIZE
from wan_accel.data.schema import NUM_POSE_POINTS, NUM_WHOLEBODY_POINTS, unpack_mask

Row = Mapping[str, Any]
Finding = tuple[str, str]  # column, what is wrong with it
Check = Callable[[Row], Iterator[Finding]]

_POINT_SHAPES = {
    "boxes": (5,), "face_boxes": (4,), "keypoints": (NUM_WHOLEBODY_POINTS, 3),
    "keypoints_3d": (NUM_WHOLEBODY_POINTS, 4), "pose_keypoints": (NUM_POSE_POINTS, 3),
}  # fmt: skip


def _timestamps(row: Row) -> Iterator[Finding]:
    seconds = np.array([np.nan if value is None else value for value in row["timestamps"] or []], float)
    if len(seconds) != row["num_frames"]:
        yield "timestamps", _frames_found(len(seconds), row)
    if not np.isfinite(seconds).all():
        yield "timestamps", f"frame {_first(~np.isfinite(seconds))} has no time"
    # A source of a lower rate gives the same frame, and time, several times.
    elif (falling := np.diff(seconds) < 0).any():
        frame = _first(falling) + 1
        yield "timestamps", f"falls at frame {frame}, from {seconds[frame - 1]:g} to {seconds[frame]:g} s"


def _video(row: Row) -> Iterator[Finding]:
    if (data := _bytes(row["video"])) is None:
        yield "video", "is missing"
    elif problem := _video_problem(data, row["num_frames"], (row["height"], row["width"])):
        yield "video", problem


def _face_video(row: Row) -> Iterator[Finding]:
    data = _bytes(row.get("face_video"))
    if (data is None) != (row.get("face_boxes") is None):
        yield "face_video", "there are " + ("face boxes" if data is None else "no face boxes") + " beside it"
    if data is not None and (problem := _video_problem(data, row["num_frames"], (FACE_SIZE, FACE_SIZE))):
        yield "face_video", problem


def _video_problem(data: bytes, num_frames: int, hw: tuple[int, int]) -> str | None:
    """Decode a video frame by frame and say what is wrong; damage that decoders hide counts too."""
    import av

    count = 0
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    return f"is damaged at frame {count}"
                if (frame.height, frame.width) != hw:
                    return f"decodes to {frame.width}x{frame.height}, expected {hw[1]}x{hw[0]}"
                count += 1
    except (av.FFmpegError, IndexError) as error:
        return f"cannot be decoded after {count} frames ({error})"
    return None if count == num_frames else f"decodes to {count} frames, its row says {num_frames}"


def _mask(row: Row) -> Iterator[Finding]:
    if row.get("mask") is None:
        return
    try:
        unpack_mask(row["mask"], (row["num_frames"], row["height"], row["width"]))
    except ValueError as error:
        yield "mask", str(error)


def _points(row: Row) -> Iterator[Finding]:
    """Boxes and points: a value a frame, and no number that is none. Absent points are NaN with score 0."""
    for column, shape in _POINT_SHAPES.items():
        if row.get(column) is None:
            continue
        try:
            values = np.array(row[column], float)  # a null in it becomes NaN
        except ValueError:
            yield column, f"its frames hold different numbers of values, expected {(row['num_frames'], *shape)}"
            continue
        if len(values) != row["num_frames"]:
            yield column, _frames_found(len(values), row)
        elif values.shape[1:] != shape:
            yield column, f"has shape {values.shape}, expected {(row['num_frames'], *shape)}"
        elif (bad := _bad_values(column, values)).any():
            yield column, f"frame {_first(bad)} has values that are NaN or infinite"


def _bad_values(column: str, values: np.ndarray) -> np.ndarray:
    """Frames (T,) with a number that is none: a box, or the place or score of a point that is there.

    Absent points have a place of NaN; measured ones have score 0 too, drawn ones keep the score that hides them.
    """
    if "boxes" in column:
        return ~np.isfinite(values).all(axis=1)
    places, scores = values[..., :-1], values[..., -1]
    absent = np.isnan(places).all(axis=2) & ((column == "pose_keypoints") | (scores == 0))
    return ~(np.isfinite(values).all(axis=2) | absent).all(axis=1)


def _face_boxes(row: Row) -> Iterator[Finding]:
    boxes = row.get("face_boxes")
    if boxes is None or any(len(box) != 4 or None in box for box in boxes):
        return
    for frame, (x1, y1, x2, y2) in enumerate(boxes):
        if not (0 <= x1 < x2 <= row["width"] and 0 <= y1 < y2 <= row["height"]):
            yield "face_boxes", f"frame {frame}: x {x1}..{x2}, y {y1}..{y2} holds no pixel of the picture"
            return


def _reference(row: Row) -> Iterator[Finding]:
    if row.get("purpose") is not None and _bytes(row["reference"]) is None:
        yield "reference", f"is missing in a clip of purpose {row['purpose']}"
    canvas_hw = row.get("canvas_height"), row.get("canvas_width")
    if row.get("purpose") == "train" and canvas_hw != (row["height"], row["width"]):
        yield "canvas_height", f"the canvas is {_size(canvas_hw)}, the video {_size((row['height'], row['width']))}"
    if (data := _bytes(row.get("reference"))) is None:
        return
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
        yield "reference", f"cannot be decoded ({str(error)[:80]})"
        return
    if (picture.height, picture.width) != canvas_hw:
        yield "reference", f"is {picture.width}x{picture.height}, its canvas {_size(canvas_hw)}"


CONTENT_CHECKS: tuple[Check, ...] = (_timestamps, _video, _face_video, _mask, _points, _face_boxes, _reference)


def _bytes(value: Mapping[str, Any] | None) -> bytes | None:
    return None if value is None else value["bytes"]


def _first(flags: np.ndarray) -> int:
    return int(np.flatnonzero(flags)[0])


def _frames_found(count: int, row: Row) -> str:
    return f"has {count} frames, its row says {row['num_frames']}"


def _size(hw: tuple[int | None, int | None]) -> str:
    return f"{hw[1]}x{hw[0]}"
