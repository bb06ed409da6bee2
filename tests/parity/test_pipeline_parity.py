"""The whole pipeline with profile upstream against recordings of the original code on real videos."""

from functools import cache

import numpy as np
import pytest
from preprocess_goldens import DEMO, DEMO_GOLDENS, UPSTREAM, arrays

from preprocessing.canvas import canvas_hw
from preprocessing.inputs import Source
from preprocessing.pipeline import Pipeline
from preprocessing.settings import ModelFiles, Runtime, Settings
from wan_accel.data.skeleton import BODY, LEFT_HAND, RIGHT_HAND

NAMES = sorted(path.stem for path in DEMO_GOLDENS.glob("*.npz"))
VIDEOS = [name for name in NAMES if "_retarget_" not in name]
RETARGETS = [name for name in NAMES if "_retarget_" in name]  # <video>_retarget_<reference picture>
MODELS = ModelFiles(
    detector=DEMO / "models/person_detector.onnx",
    pose=DEMO / "models/wholebody133.onnx",
    segmenter=DEMO / "models/person_segmenter.onnx",
)
WITHIN = 0.99  # another CPU rounds differently, and a peak can fall into the neighbouring cell


def frame_hw(video: str) -> tuple[int, int]:
    height, width = arrays(video, DEMO_GOLDENS)["frame_hw"]
    return int(height), int(width)


TRAINABLE = [video for video in VIDEOS if not any(side % 16 for side in frame_hw(video))]
"""Those whose frames can be a clip as they are; others are resized, which the recordings are not."""


def area_of(hw: tuple[int, int]) -> int:
    """The least area whose canvas is the picture itself: the original's rounding loses a step at the exact one."""
    areas = range(hw[0] * hw[1], (hw[0] + 16) * (hw[1] + 16))
    return next(area for area in areas if canvas_hw(hw, area, 16, profile=UPSTREAM) == hw)


@cache
def row_of(video: str, **changes) -> dict:
    """The one clip of a video: as many frames as were recorded, but for the 4n + 1."""
    golden = arrays(video, DEMO_GOLDENS)
    path = DEMO / "videos" / f"{video}.mp4"
    num_frames = (int(golden["frame_count"]) - 1) // 4 * 4 + 1
    settings = Settings(profile="upstream", fps=float(golden["fps"]), num_frames=num_frames, **changes)
    (row,) = Pipeline(settings, MODELS, runtime=Runtime(num_threads=2)).process(Source(path=str(path)), path)
    return row


def share_within(result, expected, tolerance) -> float:
    return (np.abs(np.asarray(result) - expected[: len(result)]) <= tolerance).mean()


def check_measures(row, golden) -> None:
    assert (row["height"], row["width"]) == tuple(golden["frame_hw"])
    np.testing.assert_allclose(row["timestamps"], np.arange(row["num_frames"]) / row["fps"], atol=1e-6)
    assert share_within(row["boxes"][:, :4], golden["bbox"][:, :4], 1) >= WITHIN  # truncated to whole pixels
    assert share_within(row["keypoints"][..., :2], golden["keypoints"][..., :2], 0.02) >= WITHIN
    assert share_within(row["keypoints"][..., 2], golden["keypoints"][..., 2], 1e-3) >= WITHIN
    assert share_within(row["face_boxes"][:, [0, 2, 1, 3]], golden["face_bbox_x1x2y1y2"], 1) >= WITHIN


@pytest.mark.parametrize("video", TRAINABLE)
def test_a_training_clip_is_measured_and_drawn_as_in_the_original(video):
    row, golden = row_of(video, area=area_of(frame_hw(video))), arrays(video, DEMO_GOLDENS)
    check_measures(row, golden)
    body = np.asarray(row["pose_keypoints"])[:, BODY]
    recorded = golden["meta_keypoints_body"] * [golden["meta_width"][0], golden["meta_height"][0], 1]
    drawn = recorded[: len(body), :, 2] >= 0.5
    assert (np.isfinite(body[..., 0]) == drawn).mean() >= WITHIN
    both = drawn & np.isfinite(body[..., 0])
    assert share_within(body[both][:, :2], recorded[: len(body)][both][:, :2], 0.05) >= WITHIN


@pytest.mark.parametrize("video", VIDEOS)
def test_a_driving_clip_is_measured_at_its_own_size(video):
    character = sorted((DEMO / "reference").glob("*.png"))[0]
    check_measures(row_of(video, purpose="drive", reference=str(character)), arrays(video, DEMO_GOLDENS))


@pytest.mark.parametrize("name", RETARGETS)
def test_a_driven_character_moves_as_the_originals(name):
    video, character = name.split("_retarget_")
    golden = arrays(name, DEMO_GOLDENS)
    row = row_of(
        video, purpose="drive", retarget="one_step", reference=str(DEMO / f"reference/{character}.png"),
        area=int(golden["resolution_area"]),
    )  # fmt: skip
    assert (row["canvas_height"], row["canvas_width"]) == tuple(golden["ref_hw"])
    pose = np.asarray(row["pose_keypoints"])
    parts = (
        (BODY, golden["kps_body"], golden["kps_body_p"], 0.05),
        (RIGHT_HAND, golden["kps_lhand"], golden["kps_lhand_p"], 1),  # upstream's names are swapped; whole pixels
        (LEFT_HAND, golden["kps_rhand"], golden["kps_rhand_p"], 1),
    )
    for rows, expected, scores, tolerance in parts:
        drawn = (scores[: len(pose)] >= 0.5) & np.isfinite(expected[: len(pose), :, 0])
        assert (np.isfinite(pose[:, rows, 0]) == drawn).mean() >= WITHIN
        both = drawn & np.isfinite(pose[:, rows, 0])
        assert share_within(pose[:, rows, :2][both], expected[: len(pose)][both], tolerance) >= WITHIN
