"""Real models on a real video against recordings of the original code with the same models."""

import hashlib
from functools import cache

import numpy as np
import pytest
from preprocess_goldens import DEMO, DEMO_GOLDENS, UPSTREAM, arrays, picture

from preprocessing.canvas import resize_by_area
from preprocessing.detection import detector_input, select_person
from preprocessing.face import crop_faces, face_boxes
from preprocessing.networks import PersonFinder, PoseMeasurer, open_detector, open_pose
from preprocessing.onnx_model import OnnxModel
from preprocessing.pose import (
    crops_of_boxes,
    hide_low_scores,
    metas_from_keypoints,
    pose62_from_metas,
)
from preprocessing.retarget import fit_retargeting, retarget
from preprocessing.skeleton import draw_pose
from preprocessing.types import FrameBatch
from preprocessing.video import decode_frames, probe
from wan_accel.data.skeleton import BODY, LEFT_HAND, RIGHT_HAND

NAMES = sorted(p.stem for p in DEMO_GOLDENS.glob("*.npz"))
VIDEOS = [name for name in NAMES if "_retarget_" not in name]
RETARGETS = [name for name in NAMES if "_retarget_" in name]  # <video>_retarget_<reference picture>
DETECTOR = DEMO / "models/person_detector.onnx"
WITHIN = 0.99  # another CPU rounds differently, and a peak can fall into the neighbouring cell


def golden(name):
    return arrays(name, DEMO_GOLDENS)


@cache
def decoded(video) -> FrameBatch:
    return decode_frames(DEMO / "videos" / f"{video}.mp4")


@cache
def detector() -> PersonFinder:
    return open_detector(DETECTOR, num_threads=2)


@cache
def pose_network() -> PoseMeasurer:
    return open_pose(DEMO / "models/wholebody133.onnx", num_threads=2, profile=UPSTREAM)


def detected_rows(frames):
    """What the detector says before people are chosen."""
    network = OnnxModel(DETECTOR, num_threads=2)
    step, hw = network.batch_frames, network.input_shape[2:]
    batches = [frames[start : start + step] for start in range(0, len(frames), step)]
    return np.concatenate([network.run(detector_input(batch, hw=hw)) for batch in batches])


def main_people(frames):
    return np.stack([select_person(people, frames.shape[1:3]) for people in detector().people(frames)])


def recorded_metas(video):
    frame_hw = tuple(int(size) for size in golden(video)["frame_hw"])
    return metas_from_keypoints(golden(video)["keypoints"], frame_hw, profile=UPSTREAM)


def lit_share_different(result, expected):
    lit = (expected > 0).any(axis=2) | (result > 0).any(axis=2)
    return (result != expected).any(axis=2).sum() / lit.sum()


def share_within(result, expected, tolerance):
    return (np.abs(result - expected) <= tolerance).mean()


@pytest.mark.parametrize("video", VIDEOS)
def test_decoded_frames_are_those_of_the_recording(video):
    expected, frames = golden(video), decoded(video)
    info = probe(DEMO / "videos" / f"{video}.mp4")
    assert info.num_frames == int(expected["frame_count"])
    assert info.fps == pytest.approx(float(expected["fps"]))
    assert frames.hw == tuple(expected["frame_hw"])
    hashes = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames.frames_rgb]
    assert hashes == list(expected["frame_sha256"])
    np.testing.assert_allclose(frames.frames_rgb.mean(axis=(1, 2)), expected["frame_mean_rgb"], atol=1e-4)


@pytest.mark.parametrize("video", VIDEOS)
def test_detections_match_the_original(video):
    expected = golden(video)
    frames = decoded(video).frames_rgb
    rows = detected_rows(frames)[:, : expected["det_rows"].shape[1]]
    assert share_within(rows, expected["det_rows"], 1e-2) >= WITHIN
    boxes = main_people(frames)
    assert share_within(boxes[:, :4], expected["bbox"][:, :4], 1) >= WITHIN  # truncated to whole pixels
    assert share_within(boxes[:, 4], expected["bbox"][:, 4], 1e-3) >= WITHIN


@pytest.mark.parametrize("video", VIDEOS)
def test_keypoints_match_the_original(video):
    expected = golden(video)
    frames = decoded(video)
    crops = crops_of_boxes(expected["bbox"], frames.hw)
    np.testing.assert_allclose(crops.center_xy, expected["center"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(crops.scale_wh, expected["scale"], rtol=0, atol=1e-4)
    keypoints = pose_network()(frames.frames_rgb, expected["bbox"]).keypoints
    assert share_within(keypoints[..., :2], expected["keypoints"][..., :2], 0.02) >= WITHIN
    assert share_within(keypoints[..., 2], expected["keypoints"][..., 2], 1e-3) >= WITHIN
    assert np.median(np.abs(keypoints - expected["keypoints"])) < 1e-3


@pytest.mark.parametrize("video", VIDEOS)
def test_metas_and_faces_match_the_original(video):
    expected, metas = golden(video), recorded_metas(video)
    assert (expected["meta_width"] == metas.width).all()
    assert (expected["meta_height"] == metas.height).all()
    for part in ("body", "left_hand", "right_hand", "face"):
        recorded = expected[f"meta_keypoints_{part}"]
        np.testing.assert_allclose(getattr(metas, part), recorded, rtol=0, atol=1e-6)
    boxes = face_boxes(metas, profile=UPSTREAM)
    np.testing.assert_array_equal(boxes[:, [0, 2, 1, 3]], expected["face_bbox_x1x2y1y2"])
    drawn = expected["draw_frames"]
    crops = crop_faces(decoded(video).frames_rgb[drawn], boxes[drawn])
    np.testing.assert_array_equal(crops[:, ::8, ::8], expected["face512_stride8"])


@pytest.mark.parametrize("video", VIDEOS)
def test_drawings_match_the_original(video):
    poses = pose62_from_metas(recorded_metas(video))
    for frame in golden(video)["draw_frames"]:
        expected = picture(f"{video}_pose_f{frame:02d}.png", DEMO_GOLDENS)
        assert lit_share_different(draw_pose(poses[frame], expected.shape[:2]), expected) <= 0.01


@pytest.mark.parametrize("name", RETARGETS)
def test_reference_is_measured_as_in_the_original(name):
    expected = golden(name)
    original = picture(f"{name.split('_retarget_')[1]}.png", DEMO / "reference")
    assert original.shape[:2] == tuple(expected["ref_hw_original"])
    resized = resize_by_area(original, int(expected["resolution_area"]), 16, profile=UPSTREAM)
    assert resized.shape[:2] == tuple(expected["ref_hw"])
    assert hashlib.sha256(resized.tobytes()).hexdigest() == str(expected["ref_resized_sha256"])
    box = main_people(resized[None])
    assert share_within(box[0, :4], expected["ref_bbox"][:4], 1) == 1
    keypoints = pose_network()(resized[None], expected["ref_bbox"][None]).keypoints
    assert share_within(keypoints[0], expected["ref_keypoints"], 0.02) >= WITHIN


@pytest.mark.parametrize("name", RETARGETS)
def test_retargeted_poses_match_the_original(name):
    expected = golden(name)
    source = recorded_metas(name.split("_retarget_")[0])
    reference_hw = tuple(int(size) for size in expected["ref_hw"])
    reference = metas_from_keypoints(expected["ref_keypoints"][None], reference_hw, profile=UPSTREAM)
    for part in ("body", "left_hand", "right_hand", "face"):
        recorded = expected[f"ref_meta_keypoints_{part}"]
        np.testing.assert_allclose(getattr(reference, part)[0], recorded, rtol=0, atol=1e-6)
    fit = fit_retargeting(source[:1], reference, profile=UPSTREAM)
    assert ((expected["width"] == fit.width) & (expected["height"] == fit.height)).all()
    pose = retarget(source, fit, profile=UPSTREAM)
    np.testing.assert_allclose(pose[:, BODY, :2], expected["kps_body"], rtol=0, atol=0.05)
    np.testing.assert_allclose(pose[:, BODY, 2], expected["kps_body_p"], rtol=0, atol=1e-6)
    for hand, rows in (("kps_lhand", RIGHT_HAND), ("kps_rhand", LEFT_HAND)):  # upstream's names are swapped
        np.testing.assert_allclose(pose[:, rows, :2], expected[hand], rtol=0, atol=1)  # whole pixels
        given = ~np.isnan(expected[hand][..., 0])
        np.testing.assert_allclose(pose[:, rows, 2][given], expected[f"{hand}_p"][given], rtol=0, atol=1e-6)
    for path in sorted(DEMO_GOLDENS.glob(f"{name}_f*.png")):
        drawing = picture(path.name, DEMO_GOLDENS)
        frame = int(path.stem.rsplit("_f", 1)[1])
        result = draw_pose(hide_low_scores(pose)[frame], drawing.shape[:2])
        assert lit_share_different(result, drawing) <= 0.01
