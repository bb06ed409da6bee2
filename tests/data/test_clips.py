"""Rows of the clips dataset decoded to arrays: encoded by the preprocessing, stored, loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocessing.video import encode_mp4, psnr_db
from wan_accel.data import store
from wan_accel.data.clips import decode_mp4, load_clip
from wan_accel.data.schema import CLIPS_SCHEMA, clips_features, pack_mask

T, H, W = 5, 32, 48


def picture(height: int, width: int, shift: int) -> np.ndarray:
    """A smooth (height, width, 3) uint8 gradient that moves with `shift`."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([(xs * 4 + shift * 3) % 256, ys * 7 % 256, np.full_like(xs, 20 * shift)], -1).astype(np.uint8)


FRAMES = np.stack([picture(H, W, t) for t in range(T)])
FACES = np.stack([picture(512, 512, t) // 2 for t in range(T)])
RNG = np.random.default_rng(0)
MASK = RNG.integers(0, 2, (T, H, W)).astype(bool)
KEYPOINTS = RNG.random((T, 133, 3), dtype=np.float32)
POSE = np.where(RNG.random((T, 62, 1)) < 0.3, np.nan, RNG.random((T, 62, 3))).astype(np.float32)
BOXES = RNG.random((T, 5), dtype=np.float32)
REFERENCE = picture(40, 24, 3)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    from PIL import Image

    def video(frames: np.ndarray) -> dict[str, Any]:
        return {"bytes": encode_mp4(frames, 16.0, min_psnr_db=42.0)[0], "path": None}

    return {
        "schema": CLIPS_SCHEMA, "clip_id": "a-00000000-0-0", "num_frames": T, "height": H, "width": W, "fps": 16.0,
        "video": video(FRAMES), "face_video": video(FACES), "mask": pack_mask(MASK),
        "reference": Image.fromarray(REFERENCE), "boxes": BOXES, "keypoints": KEYPOINTS, "pose_keypoints": POSE,
        "canvas_height": 40, "canvas_width": 24,
    }  # fmt: skip


def stored(tmp_path: Path, *rows: dict[str, Any], animate: bool = True) -> Any:
    root = tmp_path / "clips"
    with store.PartWriter(root, writer="w0", features=clips_features(animate=animate)) as writer:
        for values in rows:
            writer.write(values)
    return store.load(root, CLIPS_SCHEMA)


def bare(row: dict[str, Any]) -> dict[str, Any]:
    names = ("schema", "clip_id", "num_frames", "height", "width", "fps", "video")
    return {name: row[name] for name in names}


@pytest.mark.parametrize("data_format", [None, "numpy"])
def test_every_column_comes_back(row, tmp_path, data_format):
    clip = load_clip(stored(tmp_path, row).with_format(data_format)[0])
    assert clip.clip_id == "a-00000000-0-0" and clip.canvas_hw == (40, 24)
    assert clip.frames_rgb.dtype == clip.faces_rgb.dtype == np.uint8
    assert psnr_db(clip.frames_rgb, FRAMES) >= 42
    assert psnr_db(clip.faces_rgb, FACES) >= 42
    assert clip.mask.dtype == bool
    np.testing.assert_array_equal(clip.mask, MASK)
    np.testing.assert_array_equal(clip.reference_rgb, REFERENCE)
    for name, expected in (("boxes", BOXES), ("keypoints", KEYPOINTS), ("pose_keypoints", POSE)):
        assert getattr(clip, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(clip, name), expected, err_msg=name)


@pytest.mark.parametrize("data_format", [None, "numpy"])
@pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "after a full row"])
def test_null_columns_are_none(row, tmp_path, data_format, neighbour):
    rows = stored(tmp_path, *([row] if neighbour else []), bare(row)).with_format(data_format)
    clip = load_clip(rows[len(rows) - 1])
    assert psnr_db(clip.frames_rgb, FRAMES) >= 42
    for name in ("reference_rgb", "mask", "faces_rgb", "boxes", "keypoints", "pose_keypoints"):
        assert getattr(clip, name) is None, name
    assert clip.canvas_hw == (H, W)


@pytest.mark.parametrize("data_format", [None, "numpy"])
def test_data_without_the_animate_columns(row, tmp_path, data_format):
    clip = load_clip(stored(tmp_path, bare(row), animate=False).with_format(data_format)[0])
    assert clip.frames_rgb.shape == FRAMES.shape and clip.mask is None and clip.reference_rgb is None


@pytest.mark.parametrize("data_format", [None, "numpy"])
def test_bytes_that_end_in_zeros_are_whole(row, tmp_path, data_format):
    """numpy strips trailing zero bytes from its byte strings; a checksum may well end in one."""
    masks = (np.random.default_rng(seed).integers(0, 2, (T, H, W)).astype(bool) for seed in range(10_000))
    mask = next(mask for mask in masks if pack_mask(mask).endswith(b"\0"))
    clip = load_clip(stored(tmp_path, {**row, "mask": pack_mask(mask)}).with_format(data_format)[0])
    np.testing.assert_array_equal(clip.mask, mask)


def test_a_transparent_reference_loses_its_alpha_in_every_format(row, tmp_path):
    from PIL import Image

    rows = stored(tmp_path, {**row, "reference": Image.fromarray(REFERENCE).convert("RGBA")})
    for data_format in (None, "numpy"):
        np.testing.assert_array_equal(load_clip(rows.with_format(data_format)[0]).reference_rgb, REFERENCE)


def test_another_number_of_frames_is_refused(row):
    with pytest.raises(
        ValueError, match=r"clip a-00000000-0-0: video is \(5, 32, 48, 3\), its row says \(9, 32, 48, 3\)"
    ):
        load_clip({**bare(row), "num_frames": 9})
    with pytest.raises(ValueError, match=r"clip a-00000000-0-0: keypoints has 4 frames, its row says 5"):
        load_clip({**row, "keypoints": KEYPOINTS[:4]})
    with pytest.raises(ValueError, match=r"clip a-00000000-0-0: faces_rgb has 4 frames, its row says 5"):
        load_clip({**row, "face_video": {"bytes": encode_mp4(FACES[:4], 16.0)[0], "path": None}})


@pytest.mark.parametrize(
    ("column", "damage"),
    [
        ("video", lambda data: b"no video"),
        ("video", lambda data: data[: len(data) // 3]),
        ("face_video", lambda data: data[: len(data) // 3]),
    ],
)
def test_a_damaged_video_names_the_clip(row, column, damage):
    with pytest.raises(ValueError, match="clip a-00000000-0-0 cannot be decoded: the video is damaged"):
        load_clip({**row, column: {"bytes": damage(row[column]["bytes"]), "path": None}})


def test_a_damaged_mask_or_picture_names_the_clip(row):
    with pytest.raises(ValueError, match="clip a-00000000-0-0 cannot be decoded: the mask is damaged"):
        load_clip({**row, "mask": row["mask"][:-5]})
    with pytest.raises(ValueError, match="clip a-00000000-0-0 cannot be decoded: cannot identify image"):
        load_clip({**row, "reference": {"bytes": b"no picture", "path": None}})


def test_a_row_without_video_is_refused(row):
    with pytest.raises(ValueError, match="clip a-00000000-0-0 has no video"):
        load_clip({**row, "video": None})


def test_decoding_is_lossless_where_the_encoding_is():
    data, settings = encode_mp4(np.zeros((T, H, W, 3), np.uint8), 16.0)
    assert settings["psnr_db"] >= 42
    np.testing.assert_array_equal(decode_mp4(data), 0)


def test_the_contract_loads_no_torch_and_no_video_library():
    code = (
        "import sys, wan_accel.data.clips, wan_accel.data.store, wan_accel.data.schema\n"
        "print([name for name in ('torch', 'datasets', 'av', 'decord', 'deepspeed') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
