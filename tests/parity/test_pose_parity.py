import re

import numpy as np
import pytest
from preprocess_goldens import arrays, full_hw, names, picture, strided

from preprocessing.heatmaps import decode_heatmaps, modulate
from preprocessing.pose import crops_of_boxes, pose62_from_metas, pose_input
from wan_accel.data.skeleton import BODY, DRAWING_THRESHOLD, LEFT_HAND, RIGHT_HAND

CROPS_HW = full_hw(arrays("03_pose_preprocess"), "norm")
LEFT_EYE, RIGHT_EYE = 15, 14  # of the 20 body points
PARTS = {
    "body": ("kps_body", BODY),
    "left_hand": ("kps_lhand", LEFT_HAND),
    "right_hand": ("kps_rhand", RIGHT_HAND),
}


def crops_and_frames():
    boxes, frame = arrays("03_pose_preprocess")["boxes"], picture("01_frame_rgb.png")
    crops = crops_of_boxes(boxes, frame.shape[:2], input_hw=CROPS_HW)
    return crops, np.repeat(frame[None], len(boxes), axis=0)


def test_decoded_points_match_the_original():
    golden = arrays("02_heatmap_decode")
    crop_wh = golden["scale"] * 200  # recorded in units of 200 pixels
    points = decode_heatmaps(golden["heatmaps"], center_xy=golden["center"], size_wh=crop_wh)
    np.testing.assert_allclose(points[..., :2], golden["points"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(points[..., 2:], golden["prob"])
    num_blurred = len(golden["blurred"])
    np.testing.assert_allclose(modulate(golden["heatmaps"][0, :num_blurred]), golden["blurred"], atol=1e-6)


def test_peak_cells_match_the_original():
    golden = arrays("02_heatmap_decode")
    maps = golden["heatmaps"]
    wh = np.tile(np.array(maps.shape[:1:-1], np.float64), (len(maps), 1))
    cells_xy = decode_heatmaps(maps, center_xy=wh / 2, size_wh=wh)[..., :2]
    expected = golden["argmax_xy"]
    border = (expected <= 1).any(-1) | (expected >= wh[:, None] - 2).any(-1)  # not refined there
    assert border.any()
    np.testing.assert_allclose(cells_xy[border], expected[border], atol=1e-5)


def test_crops_match_the_original():
    golden = arrays("03_pose_preprocess")
    crops, _ = crops_and_frames()
    np.testing.assert_allclose(crops.center_xy, golden["center"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(crops.scale_wh, golden["scale"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(crops.top_left_xy, golden["crop_ul"])
    np.testing.assert_array_equal(crops.bottom_right_xy, golden["crop_br"])
    size_hw = (crops.bottom_right_xy - crops.top_left_xy)[:, ::-1]
    np.testing.assert_array_equal(size_hw, golden["crop_hw"])


def test_network_input_matches_the_original():
    golden = arrays("03_pose_preprocess")
    crops, frames = crops_and_frames()
    batch = pose_input(frames, crops, input_hw=CROPS_HW)
    expected, stride = strided(golden, "norm")
    np.testing.assert_allclose(batch[:, :, ::stride, ::stride], expected, rtol=0, atol=1e-4)
    for key in golden:
        if match := re.fullmatch(r"norm_full_case(\d+)", key):
            np.testing.assert_allclose(batch[int(match[1])], golden[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", [*PARTS, "face"])
def test_metas_match_the_original(metas, part):
    expected = arrays("05_metas")[f"keypoints_{part}"]
    np.testing.assert_allclose(getattr(metas, part), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_pixel_poses_match_the_original(metas, part):
    golden, (name, rows) = arrays("05_aapose_px"), PARTS[part]
    pose = pose62_from_metas(metas)[:, rows]
    shown = golden[f"{name}_p"] >= DRAWING_THRESHOLD
    np.testing.assert_allclose(pose[..., 2], golden[f"{name}_p"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(pose[shown][:, :2], golden[name][shown], rtol=0, atol=1e-3)
    assert np.isnan(pose[~shown][:, :2]).all()
    scaled = getattr(metas, part)[..., :2] * np.array([metas.width, metas.height])
    np.testing.assert_allclose(scaled, golden[name], rtol=0, atol=1e-3)


def test_face_pixels_match_the_original(metas):
    golden = arrays("05_aapose_px")
    scaled = metas.face[..., :2] * np.array([metas.width, metas.height])
    np.testing.assert_allclose(scaled, golden["kps_face"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(metas.face[..., 2], golden["kps_face_p"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", names("05_load_from_kp2ds_frame*.npz"))
def test_one_frame_matches_the_originals_other_loader(metas, path):
    golden, frame = arrays(path.removesuffix(".npz")), int(re.search(r"frame(\d+)", path)[1])
    body, face = metas.body[frame], metas.face[frame]
    # That loader has no heel in the face, but both eyes.
    parts = {"body": body, "face": np.concatenate([face[1:], body[[LEFT_EYE, RIGHT_EYE]]])}
    for part, points in parts.items():
        pixels = points[:, :2] * np.array([metas.width, metas.height])
        np.testing.assert_allclose(pixels, golden[f"kps_{part}"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(points[:, 2], golden[f"kps_{part}_p"], rtol=0, atol=1e-6)
