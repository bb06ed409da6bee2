import io
import shutil

import numpy as np
import pytest
from PIL import Image

from preprocessing.inspect import NUM_COLUMNS, contact_sheet, sheet_rows, write_sheets
from preprocessing.video import encode_mp4
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import CLIPS_SCHEMA, QUALITY, clips_features, pack_mask

T, H, W = 9, 96, 64


def clip_row(name: str, *, canvas: tuple[int, int] = (H, W)) -> dict:
    """A clip of a red block that moves over grey, with every column."""
    frames = np.full((T, H, W, 3), 128, np.uint8)
    mask = np.zeros((T, H, W), bool)
    for i in range(T):
        mask[i, 30:70, 2 * i : 2 * i + 20] = True
    frames[mask] = 220, 30, 30
    pose = np.full((T, 62, 3), np.nan, np.float32)
    pose[..., 2] = 0
    pose[:, 1], pose[:, 8] = [10, 20, 0.9], [30, 60, 0.9]  # neck to right hip
    picture = io.BytesIO()
    Image.new("RGB", canvas[::-1], (20, 90, 20)).save(picture, "PNG")
    faces = np.full((T, 512, 512, 3), 200, np.uint8)
    return {
        "schema": CLIPS_SCHEMA, "clip_id": name, "caption": "a block moves", "purpose": "train", "num_frames": T,
        "height": H, "width": W, "fps": 10.0, "timestamps": [i / 10 for i in range(T)],
        "source": {"path": "x.mp4", "sha256": "0" * 64, "start_seconds": 0.0, "end_seconds": 0.9, "track": 0},
        "video": {"bytes": encode_mp4(frames, 10.0)[0], "path": None},
        "reference": {"bytes": picture.getvalue(), "path": None},
        "reference_source": {"kind": "frame", "seconds": 0.0}, "modes": ["animation"],
        "boxes": np.tile(np.float32([0, 30, 20, 70, 1]), (T, 1)), "keypoints": np.zeros((T, 133, 3), np.float32),
        "pose_keypoints": pose, "canvas_height": canvas[0], "canvas_width": canvas[1],
        "face_boxes": np.tile(np.int32([0, 30, 20, 50]), (T, 1)),
        "face_video": {"bytes": encode_mp4(faces, 10.0)[0], "path": None}, "mask": pack_mask(mask),
        "quality": dict.fromkeys(QUALITY, 0.5), "settings_hash": "", "provenance": "{}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("inspect") / "clips"
    store.claim_output(output, schema=CLIPS_SCHEMA, settings={})
    with store.PartWriter(output, writer="writer0", features=clips_features()) as writer:
        for row in (clip_row("first"), clip_row("second", canvas=(64, 96)), clip_row("third"), clip_row("fourth")):
            writer.write(row)
    return output


def test_the_rows_of_a_sheet_show_the_same_moments(dataset):
    clip = load_clip(store.load(dataset, CLIPS_SCHEMA)[0])
    steps = np.array([0, 4, 8])
    rows = {row.label.split("\n")[0]: row.pictures for row in sheet_rows(clip, steps)}
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(rows["frame"][i], clip.frames_rgb[step])
        inside, outside = clip.mask[step], ~clip.mask[step]
        assert (rows["background"][i][inside] == 0).all()
        np.testing.assert_array_equal(rows["background"][i][outside], clip.frames_rgb[step][outside])
        np.testing.assert_array_equal(rows["mask"][i][outside], clip.frames_rgb[step][outside])
        assert (rows["mask"][i][inside] != clip.frames_rgb[step][inside]).any()
        np.testing.assert_array_equal(rows["face"][i], clip.faces_rgb[step])
        assert rows["pose"][i].any() and not rows["pose"][i][80:].any()


def test_a_pose_is_drawn_on_the_canvas_of_the_reference(dataset):
    clip = load_clip(store.load(dataset, CLIPS_SCHEMA)[1])
    rows = {row.label.split("\n")[0]: row.pictures for row in sheet_rows(clip, np.array([0]))}
    assert rows["pose"][0].shape == rows["reference"][0].shape == (64, 96, 3)
    assert rows["frame"][0].shape == (H, W, 3)


def test_parts_that_a_clip_lacks_are_left_out():
    row = clip_row("bare")
    for name in ("reference", "pose_keypoints", "face_video", "mask", "boxes", "keypoints"):
        row[name] = None
    labels = [sheet.label.split("\n")[0] for sheet in sheet_rows(load_clip(row), np.array([0]))]
    assert labels == ["frame"]
    assert contact_sheet(load_clip(row), row).width > 0


def test_one_picture_a_clip_evenly_sampled(dataset, tmp_path):
    assert [path.stem for path in write_sheets(dataset, tmp_path / "all")] == ["first", "second", "third", "fourth"]
    paths = write_sheets(dataset, tmp_path / "some", num_clips=2)
    assert [path.stem for path in paths] == ["first", "fourth"]
    with Image.open(paths[0]) as sheet:
        assert sheet.width > NUM_COLUMNS * 100 and sheet.height > 6 * 100


def test_what_is_no_clips_dataset_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="is not a dataset of wan-accel"):
        write_sheets(tmp_path, tmp_path / "sheets")
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (part,) = copy.rglob("*.arrow")
    part.write_bytes(part.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is damaged"):
        write_sheets(copy, tmp_path / "sheets")
