import numpy as np
import pytest
from clip_rows import H, W, clip_row

from preprocessing.contact_sheet import NUM_COLUMNS, contact_sheet, sheet_rows
from wan_accel.data.clips import load_clip


@pytest.fixture(scope="module")
def row():
    return clip_row("first")


def test_the_rows_of_a_sheet_show_the_same_moments(row):
    clip = load_clip(row)
    steps = np.array([0, 4, 8])
    rows = {sheet.label: sheet.pictures for sheet in sheet_rows(clip, steps)}
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(rows["frame"][i], clip.frames_rgb[step])
        inside, outside = clip.mask[step], ~clip.mask[step]
        assert (rows["background"][i][inside] == 0).all()
        np.testing.assert_array_equal(rows["background"][i][outside], clip.frames_rgb[step][outside])
        np.testing.assert_array_equal(rows["mask"][i][outside], clip.frames_rgb[step][outside])
        assert (rows["mask"][i][inside] != clip.frames_rgb[step][inside]).any()
        np.testing.assert_array_equal(rows["face"][i], clip.faces_rgb[step])
        assert rows["pose"][i].any() and not rows["pose"][i][80:].any()


def test_a_pose_is_drawn_on_the_canvas_of_the_reference():
    clip = load_clip(clip_row("second", canvas=(64, 96)))
    rows = {sheet.label: sheet.pictures for sheet in sheet_rows(clip, np.array([0]))}
    assert rows["pose"][0].shape == rows["reference"][0].shape == (64, 96, 3)
    assert rows["frame"][0].shape == (H, W, 3)


def test_parts_that_a_clip_lacks_are_left_out():
    row = clip_row("bare")
    for name in ("reference", "pose_keypoints", "face_video", "mask", "boxes", "keypoints", "quality"):
        row[name] = None
    assert [sheet.label for sheet in sheet_rows(load_clip(row), np.array([0]))] == ["frame"]
    assert contact_sheet(load_clip(row), row).width > 0


def test_a_sheet_holds_all_rows_under_a_header_that_is_drawn(row):
    sheet = np.asarray(contact_sheet(load_clip(row), row))
    assert sheet.shape[1] > NUM_COLUMNS * 100 and sheet.shape[0] > 6 * 100
    for top in (6, 29, 49, 67):  # id, caption, facts, figures
        assert sheet[top : top + 16].min() < 150
    other = np.asarray(contact_sheet(load_clip(row), {**row, "quality": {**row["quality"], "blur": 7.0}}))
    assert (sheet[67:85] != other[67:85]).any() and (sheet[:60] == other[:60]).all()
