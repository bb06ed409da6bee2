import av
import numpy as np
from clip_rows import H, T, W, clip_row

from preprocessing.overlay import overlay_frames, write_browser_mp4
from wan_accel.data.clips import load_clip

GREY, RED = [128, 128, 128], [220, 30, 30]


def drawn(**changes) -> np.ndarray:
    row = clip_row("clip", **changes)
    return overlay_frames(load_clip(row), row).astype(int)


BARE = {"mask": None, "pose_keypoints": None, "keypoints": None, "boxes": None, "face_boxes": None}


def difference(**kept) -> np.ndarray:
    """Where (T, H, W) an overlay of one part differs from the bare frames."""
    changes = {**BARE, **{name: clip_row("clip")[name] for name in kept.pop("parts")}, **kept}
    return (np.abs(drawn(**changes) - drawn(**BARE)) > 3).any(axis=3)


def test_the_mask_tints_the_person_and_nothing_else():
    mask = load_clip(clip_row("clip")).mask
    np.testing.assert_array_equal(difference(parts=["mask"]), mask)


def test_boxes_are_drawn_where_they_are_and_named_by_their_track():
    person = difference(parts=["boxes"])
    assert person[:, 69:71, 2:19].all() and person[:, 32:70, 20].all()  # bottom and right edge of 0, 30, 20, 70
    assert not person[:, 35:65, 5:17].any() and not person[:, 75:].any()
    other = {**clip_row("clip")["source"], "track": 7}
    names = (drawn(**{**BARE, "boxes": clip_row("clip")["boxes"]}), drawn(
        **{**BARE, "boxes": clip_row("clip")["boxes"], "source": other}
    ))  # fmt: skip
    changed = (names[0] != names[1]).any(axis=3)
    assert changed[:, :31].any() and not changed[:, 31:].any()
    face = difference(parts=["face_boxes"])
    assert face[:, 49:51, 2:19].all() and not face[:, 55:].any()


def test_a_frame_without_a_person_gets_no_box():
    boxes = clip_row("clip")["boxes"].copy()
    boxes[4] = -1
    person = difference(parts=["boxes"], boxes=boxes)
    assert not person[4].any() and person[3].any() and person[5].any()


def test_the_stored_skeleton_is_drawn_for_training_and_the_measured_one_for_driving():
    stored = difference(parts=["pose_keypoints"])
    assert stored[:, 38:42, 19:22].any() and not stored[:, 80:].any()  # neck 10, 20 to hip 30, 60
    measured = np.zeros((T, 133, 3), np.float32)
    measured[:, 5], measured[:, 11] = [40, 70, 0.9], [50, 90, 0.9]
    measured[:, 6], measured[:, 12] = [40, 70, 0.9], [50, 90, 0.9]
    drive = difference(parts=["pose_keypoints"], keypoints=measured, purpose="drive")
    assert drive[:, 75:85, 40:50].any() and not drive[:, :60].any()


def test_large_frames_shrink_to_even_sides():
    row = clip_row("clip")
    clip = load_clip(row)
    small = overlay_frames(clip, row, long_side=50)
    assert small.shape == (T, 50, 34, 3)
    assert overlay_frames(clip, row).shape == (T, H, W, 3)


def test_the_video_is_one_that_every_browser_plays(tmp_path):
    frames = drawn().astype(np.uint8)
    write_browser_mp4(tmp_path / "x.mp4", frames, 12.5)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12.5)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(decoded.astype(int) - frames).mean() < 8  # 4:2:0 costs thin lines on a small picture their colour
    data = (tmp_path / "x.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # plays before it has all arrived
