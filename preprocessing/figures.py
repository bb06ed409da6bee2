"""How the quality figures are called and read: names for people, formats, and which end of a figure is bad."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A column of `quality`: its name for people, format, what it says, and which of its ends a bad clip is at."""

    label: str
    format: str
    meaning: str
    bad_end: Literal["low", "high"]


FIGURES: dict[str, Figure] = {
    "mean_keypoint_score": Figure(
        label="key points", format=".2f", bad_end="low", meaning="mean score of the 17 body points"
    ),
    "visible_share": Figure(
        label="visible", format=".0%", bad_end="low", meaning="body points in the picture and confident"
    ),
    "hand_score": Figure(label="hands", format=".2f", bad_end="low", meaning="mean score of the 42 hand points"),
    "face_size": Figure(label="face", format=".0f", bad_end="low", meaning="shorter side of the face box, pixels"),
    "mask_area_mean": Figure(
        label="mask", format=".1%", bad_end="low", meaning="share of the picture that the person covers"
    ),
    "mask_area_jitter": Figure(
        label="mask jitter", format=".3f", bad_end="high", meaning="change of the mask's area from frame to frame"
    ),
    "motion": Figure(
        label="motion", format=".3f", bad_end="low", meaning="way of body points a frame, in heights of the person"
    ),
    "luma_change": Figure(
        label="change", format=".2f", bad_end="low", meaning="change of brightness from frame to frame, 8-bit steps"
    ),
    "blur": Figure(label="sharpness", format=".0f", bad_end="low", meaning="variance of the Laplacian; low is blurred"),
    "track_switches": Figure(
        label="switches", format=".0f", bad_end="high", meaning="jumps of the box to another person"
    ),
}  # fmt: skip
