"""Values that travel between preprocessing stages, and the table of behaviours a stage can follow."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]
Int = NDArray[np.integer[Any]]
Frames = NDArray[np.uint8]  # (T, H, W, 3) RGB
ChannelOrder = Literal["rgb", "bgr"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrameBatch:
    """Decoded frames and the time at which each is shown.

    frames_rgb: (T, H, W, 3) uint8. pts_seconds: (T,) float64, seconds from the start of the source.
    """

    frames_rgb: Frames
    pts_seconds: Float

    def __post_init__(self) -> None:
        check_frames(self.frames_rgb)
        if self.pts_seconds.shape != (len(self.frames_rgb),):
            raise ValueError(
                f"pts_seconds has shape {self.pts_seconds.shape} for {len(self.frames_rgb)} frames: "
                "give one time a frame"
            )

    def __len__(self) -> int:
        return len(self.frames_rgb)

    @property
    def hw(self) -> tuple[int, int]:
        return self.frames_rgb.shape[1], self.frames_rgb.shape[2]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PoseMetas:
    """Key points of T frames as fractions of the canvas, in the layout that Wan2.2-Animate draws.

    Every array is (T, N, 3): x / width, y / height, score. `body` rows: nose, neck, right shoulder, elbow,
    wrist, left shoulder, elbow, wrist, right hip, knee, ankle, left hip, knee, ankle, right eye, left eye,
    right ear, left ear, left toe, right toe. Hands hold 21 points, wrist first. `face` row 0 is the right
    heel, as in the original, rows 1..68 are the face landmarks.
    """

    body: Float  # (T, 20, 3)
    left_hand: Float  # (T, 21, 3)
    right_hand: Float  # (T, 21, 3)
    face: Float  # (T, 69, 3)
    width: int
    height: int

    def __post_init__(self) -> None:
        num_frames = len(self.body)
        for name, num_points in (("body", 20), ("left_hand", 21), ("right_hand", 21), ("face", 69)):
            shape = getattr(self, name).shape
            if shape != (num_frames, num_points, 3):
                raise ValueError(f"{name} has shape {shape}, expected {(num_frames, num_points, 3)}")

    def __len__(self) -> int:
        return len(self.body)

    def __getitem__(self, frames: slice) -> "PoseMetas":
        return PoseMetas(
            body=self.body[frames],
            left_hand=self.left_hand[frames],
            right_hand=self.right_hand[frames],
            face=self.face[frames],
            width=self.width,
            height=self.height,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Person:
    """One tracked person through T frames: boxes (T, 5), score below 0 where absent; key points (T, 133, 3) or None."""

    boxes_xyxys: Float
    keypoints: Float | None

    def part(self, frames: range) -> "Person":
        """The same person in some of the frames."""
        rows = slice(frames.start, frames.stop)
        keypoints = None if self.keypoints is None else self.keypoints[rows]
        return Person(boxes_xyxys=self.boxes_xyxys[rows], keypoints=keypoints)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessProfile:
    """How the stages behave where the original preprocessing is wrong and a choice is needed."""

    people: Literal["tracked", "per_frame"]
    """Who a clip shows: one person followed through the shot, or each frame's main person on its own."""
    boxes: Literal["smoothed", "as_detected"]
    shots: Literal["split", "ignored"]
    """Whether clips may reach across cuts."""
    pose_channel_order: ChannelOrder
    """Channel order that the pose network sees; its normalisation constants are those of RGB."""
    frame_without_person: Literal["full_frame", "absent"]
    """Pose of a frame without a person: measured on the whole frame, or NaN points of score 0."""
    lost_body: Literal["previous", "absent"]
    """A body with every point outside the top left: the previous frame's body, or score 0."""
    canvas_rounding: Literal["float_floor", "integer_floor"]
    """float_floor loses a step to rounding errors (480x832 becomes 464x832 at its own area)."""
    canvas_fit: Literal["pad", "crop"]
    """Remaining rows or columns of a canvas: black, or cut off by scaling to cover it."""
    driving_frames: Literal["as_decoded", "resized"]
    """Size at which the person of purpose `drive` is measured: the video's own, or that of the area."""
    frame_sampling: Literal["average_fps", "timestamps"]
    degenerate_face: Literal["raise", "nearest"]
    """A face off screen or without extent: an error, or the box of the nearest earlier (else later) frame."""
    face_crops: Literal["stretched", "square"]
    """stretched: each frame's own box, whatever its shape and score; square: smoothed boxes of faces that were seen."""
    segmenter_points: Literal["all_points", "visible_points"]
    """Body points that prompt a video segmenter."""
    retarget_ratios: Literal["all_points", "visible_points"]
    """Points that bone lengths are measured on; invisible ones are wherever the network put them."""
    retarget_hands: Literal["nearest_wrist", "own_wrist"]
    """nearest_wrist swaps hands that seem closer to the other wrist, and misplaces both."""
    retarget_hand_size: Literal["shoulders", "forearms"]
    """Bones whose ratio scales the hands; in profile the shoulders' is far off."""
    retarget_rounding: Literal["whole_pixels", "exact"]
    """whole_pixels truncates the reference's scaled canvas and the points of hands."""
    ground_contact: Literal["source_ankle", "ankle_toe"]
    """Source height that meets the reference's mean of ankle and toe: the ankle alone, or the same mean."""


PROFILES: dict[str, PreprocessProfile] = {
    "wan": PreprocessProfile(
        people="tracked",
        boxes="smoothed",
        shots="split",
        pose_channel_order="rgb",
        frame_without_person="absent",
        lost_body="absent",
        canvas_rounding="integer_floor",
        canvas_fit="crop",
        driving_frames="resized",
        frame_sampling="timestamps",
        degenerate_face="nearest",
        face_crops="square",
        segmenter_points="visible_points",
        retarget_ratios="visible_points",
        retarget_hands="own_wrist",
        retarget_hand_size="forearms",
        retarget_rounding="exact",
        ground_contact="ankle_toe",
    ),
    "upstream": PreprocessProfile(
        people="per_frame",
        boxes="as_detected",
        shots="ignored",
        pose_channel_order="bgr",
        frame_without_person="full_frame",
        lost_body="previous",
        canvas_rounding="float_floor",
        canvas_fit="pad",
        driving_frames="as_decoded",
        frame_sampling="average_fps",
        degenerate_face="raise",
        face_crops="stretched",
        segmenter_points="all_points",
        retarget_ratios="all_points",
        retarget_hands="nearest_wrist",
        retarget_hand_size="shoulders",
        retarget_rounding="whole_pixels",
        ground_contact="source_ankle",
    ),
}
WAN = PROFILES["wan"]


def check_frames(frames_rgb: Frames) -> None:
    """Raise ValueError unless `frames_rgb` is (T, H, W, 3) uint8."""
    if frames_rgb.dtype != np.uint8 or frames_rgb.ndim != 4 or frames_rgb.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames_rgb.dtype} {frames_rgb.shape}, expected RGB uint8 (T, H, W, 3)"
        )
