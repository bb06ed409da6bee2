"""What a video segmenter is told about a person: points to click on, the box, and who else is there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.pose import metas_from_keypoints
from preprocessing.types import WAN, Float, Person, PoseMetas, PreprocessProfile

_PROMPT_POINTS = [0, 1, 2, 5, 8, 11, 10, 13]  # nose, neck, shoulders, hips, ankles
_PROMPT_SCORE = 0.5
_KEY_FRAMES = 4
_HEIGHTS_OF_OTHERS = (0.25, 0.5)  # chest and hips: on the person, whichever way their limbs point


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FramePrompt:
    """Prompts in one frame: points (P, 2) x, y in pixels, on the person (True) or on somebody else; a box or None."""

    frame: int
    points_xy: Float
    on_person: NDArray[np.bool_]
    box_xyxy: Float | None


def frame_prompts(
    person: Person, others: Sequence[Person], frame_hw: tuple[int, int], *, profile: PreprocessProfile = WAN
) -> list[FramePrompt]:
    """Choose frames of a chunk and what to say about them.

    `upstream` clicks on 8 body points in evenly spaced frames, wherever these points are. `wan` takes, in each of 4
    equal spans, the frame that shows most of these points, gives those that score 0.5 and lie in the picture together
    with the tracked box, and points at the others where they are outside that box.
    """
    if person.keypoints is None:
        raise ValueError("prompts need the person's key points")
    metas = metas_from_keypoints(person.keypoints, frame_hw, profile=profile)
    if profile.segmenter_points == "all_points":
        frames = key_frames(len(metas))
        return [
            FramePrompt(
                frame=frame, points_xy=points.astype(float), on_person=np.ones(len(points), bool), box_xyxy=None
            )
            for frame, points in zip(frames, point_prompts(metas, frames, profile=profile))
        ]
    clicks = point_prompts(metas, list(range(len(metas))), profile=profile)
    prompts = [
        _prompt(frame, clicks[frame], person, others, frame_hw)
        for frame in _telling_frames(metas, [len(points) for points in clicks], person.boxes_xyxys[:, 4] > 0)
    ]
    return [prompt for prompt in prompts if prompt.box_xyxy is not None or prompt.on_person.any()]


def key_frames(num_frames: int) -> list[int]:
    """Choose the frames of a chunk that the original gives prompts: 1 of up to 4 frames, else 4 to 7, evenly spaced."""
    return list(range(0, num_frames, num_frames // (_KEY_FRAMES if num_frames > _KEY_FRAMES else 1)))


def point_prompts(metas: PoseMetas, frames: list[int], *, profile: PreprocessProfile = WAN) -> list[NDArray[np.int32]]:
    """Return for each of `frames` the pixels (P, 2) x, y to click on, all of them on the person.

    Nose, neck, shoulders, hips and ankles. `upstream` gives all 8 whatever their score and position; `wan`
    those that score 0.5 and lie in the picture.
    """
    points = metas.body[frames][:, _PROMPT_POINTS]
    wh = np.array([metas.width, metas.height])
    xy_pixels = points[..., :2] * wh
    kept = np.ones(points.shape[:2], bool)
    if profile.segmenter_points == "visible_points":
        inside = (xy_pixels >= 0).all(axis=2) & (xy_pixels < wh).all(axis=2)
        kept = (points[..., 2] >= _PROMPT_SCORE) & inside
    return [xy[keep].astype(np.int32) for xy, keep in zip(xy_pixels, kept)]


def _telling_frames(metas: PoseMetas, num_points: list[int], present: NDArray[np.bool_]) -> list[int]:
    """The best frame of each span: most points, then the highest scores, then the earliest."""
    scores = np.nan_to_num(metas.body[:, _PROMPT_POINTS, 2]).mean(axis=1)
    spans = np.array_split(np.flatnonzero(present), _KEY_FRAMES)
    return [int(max(span, key=lambda frame: (num_points[frame], scores[frame]))) for span in spans if len(span)]


def _prompt(
    frame: int, clicks: NDArray[np.int32], person: Person, others: Sequence[Person], frame_hw: tuple[int, int]
) -> FramePrompt:
    box = np.clip(person.boxes_xyxys[frame, :4], 0, [frame_hw[1], frame_hw[0]] * 2)
    away = _points_on_others(frame, box, others, frame_hw)
    return FramePrompt(
        frame=frame,
        points_xy=np.concatenate([clicks.astype(np.float64), away]),
        on_person=np.arange(len(clicks) + len(away)) < len(clicks),
        box_xyxy=box if (box[2:] > box[:2]).all() else None,
    )


def _points_on_others(frame: int, box_xyxy: Float, others: Sequence[Person], frame_hw: tuple[int, int]) -> Float:
    """(P, 2) points on other people that cannot be on this one: outside the box."""
    points = [
        ((x1 + x2) / 2, y1 + height * (y2 - y1))
        for x1, y1, x2, y2, score in (other.boxes_xyxys[frame] for other in others)
        if score > 0
        for height in _HEIGHTS_OF_OTHERS
    ]
    xy = np.array(points, np.float64).reshape(-1, 2)
    in_picture = ((xy >= 0) & (xy < [frame_hw[1], frame_hw[0]])).all(axis=1)
    in_box = ((xy >= box_xyxy[:2]) & (xy <= box_xyxy[2:])).all(axis=1)
    return np.asarray(xy[in_picture & ~in_box])
