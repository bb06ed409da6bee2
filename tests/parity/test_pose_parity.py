import numpy as np
import pytest
from preprocess_goldens import UPSTREAM, arrays, picture

from preprocessing.detection import decode_people, select_person
from preprocessing.heatmaps import decode_heatmaps, modulate
from preprocessing.pose import crops_of_boxes, metas_from_keypoints, pose62_from_metas, pose_input
from wan_accel.data.skeleton import BODY, LEFT_HAND, RIGHT_HAND

PARTS = {
    "body": ("kps_body", BODY),
    "left_hand": ("kps_lhand", LEFT_HAND),
    "right_hand": ("kps_rhand", RIGHT_HAND),
}


def test_decoded_points_match_the_original():
    golden = arrays("02_heatmap_decode")
    points = decode_heatmaps(
        golden["heatmaps"], center_xy=golden["center"], size_wh=golden["scale"] * 200
    )
    np.testing.assert_allclose(points[..., :2], golden["points"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(points[..., 2:], golden["prob"])
    num_blurred = len(golden["blurred"])
    np.testing.assert_allclose(modulate(golden["heatmaps"][0, :num_blurred]), golden["blurred"], atol=1e-6)


def test_peak_cells_match_the_original():
    golden = arrays("02_heatmap_decode")
    maps = golden["heatmaps"]
    refined_xy = decode_heatmaps(
        maps,
        center_xy=np.full((len(maps), 2), np.array(maps.shape[:1:-1]) / 2),
        size_wh=np.tile(np.array(maps.shape[:1:-1], np.float64), (len(maps), 1)),
    )[..., :2]  # in cells
    height, width = maps.shape[2:]
    edge = (golden["argmax_xy"] <= 1).any(-1) | (golden["argmax_xy"] >= (width - 2, height - 2)).any(-1)
    np.testing.assert_allclose(refined_xy[edge], golden["argmax_xy"][edge], atol=1e-5)  # not refined there


def test_crops_match_the_original():
    golden = arrays("03_pose_preprocess")
    frame = picture("01_frame_rgb.png")
    crops = crops_of_boxes(golden["boxes"], frame.shape[:2])
    np.testing.assert_allclose(crops.center_xy, golden["center"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(crops.scale_wh, golden["scale"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(crops.top_left_xy, golden["crop_ul"])
    np.testing.assert_array_equal(crops.bottom_right_xy, golden["crop_br"])
    size_hw = (crops.bottom_right_xy - crops.top_left_xy)[:, ::-1]
    np.testing.assert_array_equal(size_hw, golden["crop_hw"])


def test_network_input_matches_the_original_to_the_bit():
    golden = arrays("03_pose_preprocess")
    frame = picture("01_frame_rgb.png")
    batch = pose_input(
        np.repeat(frame[None], len(golden["boxes"]), axis=0), crops_of_boxes(golden["boxes"], frame.shape[:2])
    )
    np.testing.assert_array_equal(batch[0], golden["norm_full_case0"])
    np.testing.assert_array_equal(batch[:, :, ::8, ::8], golden["norm_stride8"])


@pytest.mark.parametrize("part", ["body", "left_hand", "right_hand", "face"])
def test_metas_match_the_original(metas, part):
    expected = arrays("05_metas")[f"keypoints_{part}"]
    np.testing.assert_allclose(getattr(metas, part), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_pixel_poses_match_the_original(metas, part):
    golden, (name, rows) = arrays("05_aapose_px"), PARTS[part]
    pose = pose62_from_metas(metas)[:, rows]
    shown = golden[f"{name}_p"] >= 0.5
    np.testing.assert_array_equal(pose[..., 2], golden[f"{name}_p"])
    np.testing.assert_allclose(pose[shown][:, :2], golden[name][shown], rtol=0, atol=1e-3)
    assert np.isnan(pose[~shown][:, :2]).all()
    scaled = getattr(metas, part)[..., :2] * np.array([metas.width, metas.height])
    np.testing.assert_allclose(scaled, golden[name], rtol=0, atol=1e-3)


def test_face_pixels_match_the_original(metas):
    golden = arrays("05_aapose_px")
    scaled = metas.face[..., :2] * np.array([metas.width, metas.height])
    np.testing.assert_allclose(scaled, golden["kps_face"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(metas.face[..., 2], golden["kps_face_p"])


def test_first_frame_matches_the_original_static_loader(metas):
    golden = arrays("05_load_from_kp2ds_frame0")
    wh = np.array([metas.width, metas.height])
    np.testing.assert_allclose(metas.body[0, :, :2] * wh, golden["kps_body"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(metas.body[0, :, 2], golden["kps_body_p"], atol=1e-6)
    num_landmarks = metas.face.shape[1] - 1  # without the heel; the loader appends the eyes
    np.testing.assert_allclose(
        metas.face[0, 1:, :2] * wh, golden["kps_face"][:num_landmarks], rtol=0, atol=1e-3
    )
    np.testing.assert_array_equal(metas.face[0, 1:, 2], golden["kps_face_p"][:num_landmarks])


def test_pose_of_two_frames_matches_the_original_end_to_end():
    golden = arrays("14_pose2d_e2e")
    frame = picture("01_frame_rgb.png")
    frame_hw = frame.shape[:2]
    frames = np.stack([np.roll(frame, roll, axis=1) for roll in golden["roll"]])
    boxes = np.stack(
        [select_person(decode_people(rows, frame_hw), frame_hw) for rows in golden["det_rows"]]
    )
    crops = crops_of_boxes(boxes, frame_hw)
    batch = pose_input(frames, crops, profile=UPSTREAM)
    np.testing.assert_array_equal(batch[:, :, ::16, ::16], golden["pose_input_stride16"])
    np.testing.assert_allclose(batch.mean(axis=(2, 3)), golden["pose_input_mean_per_channel"], atol=1e-3)
    keypoints = decode_heatmaps(golden["heatmaps"], center_xy=crops.center_xy, size_wh=crops.size_wh)
    metas = metas_from_keypoints(keypoints, frame_hw, profile=UPSTREAM)
    for part in ("body", "left_hand", "right_hand", "face"):
        np.testing.assert_allclose(getattr(metas, part), golden[f"keypoints_{part}"], rtol=0, atol=1e-6)
