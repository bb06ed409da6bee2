import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from small_runs import DEMO, MODELS, main_people, pipeline, process

from preprocessing.description import hash_of_model
from preprocessing.half_precision import half_precision
from preprocessing.network_files import cache_folder
from preprocessing.networks import open_detector, open_pose
from preprocessing.onnx_model import OnnxModel
from preprocessing.video import decode_frames


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def float_weights(path: Path) -> dict[int, int]:
    """Elements by type of the floating-point weights."""
    counts = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in counts:
            counts[tensor.data_type] += numpy_helper.to_array(tensor).size
    return counts


def test_weights_are_halved_and_inputs_and_outputs_stay(cache):
    before = {path: path.stat().st_mtime_ns for path in MODELS.segmenter.parent.iterdir()}
    made = half_precision(MODELS.segmenter)
    assert made.is_relative_to(cache / "fp16") and made.name == MODELS.segmenter.name
    was, now = float_weights(MODELS.segmenter), float_weights(made)
    assert was[TensorProto.FLOAT16] == 0 and now[TensorProto.FLOAT16] > 0.99 * was[TensorProto.FLOAT]
    original, halved = OnnxModel(MODELS.segmenter), OnnxModel(MODELS.segmenter, fp16=True)
    assert halved.input_shape == original.input_shape
    picture = decode_frames(DEMO / "videos/walker.mp4", [45]).frames_rgb[:, 200:712:2, :480:2] / np.float32(255)
    picture = np.pad(picture, ((0, 0), (0, 0), (8, 8), (0, 0)))
    probability = halved.run(picture)
    assert probability.dtype == np.float32
    expected = original.run(picture)
    # The edge of a person is steep, so that a probability there moves by more than float16's 3 digits.
    assert 0 < np.abs(probability - expected).max() < 0.06
    assert ((probability > 0.5) != (expected > 0.5)).mean() < 1e-3 < (expected > 0.5).mean()
    assert {path: path.stat().st_mtime_ns for path in MODELS.segmenter.parent.iterdir()} == before


@pytest.mark.parametrize("video", ["walker", "jumping", "two_people"])
def test_people_and_key_points_are_those_of_full_precision(video):
    """Boxes are whole pixels: 1 pixel. Key points: a heat map's cell is 10 px here; float16 moves peaks by far less."""
    frames = decode_frames(DEMO / f"videos/{video}.mp4", range(0, 90, 18)).frames_rgb
    full, half = (open_detector(MODELS.detector, fp16=fp16).people(frames) for fp16 in (False, True))
    for people, expected in zip(half, full, strict=True):
        np.testing.assert_allclose(people[:, :4], expected[:, :4], atol=1)
        np.testing.assert_allclose(people[:, 4], expected[:, 4], atol=2e-3)
    boxes = main_people(open_detector(MODELS.detector), frames)
    expected, points = (open_pose(MODELS.pose, fp16=fp16)(frames, boxes).keypoints for fp16 in (False, True))
    moved = np.linalg.norm(points[..., :2] - expected[..., :2], axis=2)
    assert 0 < np.median(moved) < 0.25 and np.percentile(moved, 95) < 2
    assert np.percentile(np.abs(points[..., 2] - expected[..., 2]), 95) < 0.02


def test_a_network_is_converted_once(cache):
    made = half_precision(MODELS.segmenter)
    written = made.stat().st_mtime_ns
    assert half_precision(MODELS.segmenter) == made and made.stat().st_mtime_ns == written
    copy = cache.parent / "elsewhere" / MODELS.segmenter.name
    copy.parent.mkdir()
    copy.write_bytes(MODELS.segmenter.read_bytes())
    assert half_precision(copy) == made  # by content
    assert half_precision(MODELS.pose).parent != made.parent


def test_workers_that_start_at_once_all_get_a_whole_file(cache):
    code = "import sys; from preprocessing.onnx_model import OnnxModel; OnnxModel(sys.argv[1], fp16=True)"
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(MODELS.pose)], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, errors
    assert len([path for path in (cache / "fp16").iterdir() if path.is_dir()]) == 1


def test_weights_in_other_files_are_converted_and_count_for_the_hash(tmp_path):
    """The released ViTPose-H is a folder: end2end.onnx and files with its weights, more than 2 GiB in all."""
    folder = tmp_path / "vitpose"
    folder.mkdir()
    onnx.save_model(
        onnx.load(MODELS.pose), folder / "end2end.onnx", save_as_external_data=True, all_tensors_to_one_file=False
    )
    assert len(list(folder.iterdir())) > 10
    made = half_precision(folder / "end2end.onnx")
    frames = decode_frames(DEMO / "videos/walker.mp4", [0]).frames_rgb
    boxes = main_people(open_detector(MODELS.detector), frames)
    whole, parts = (open_pose(path, fp16=True)(frames, boxes).keypoints for path in (MODELS.pose, folder))
    np.testing.assert_allclose(parts, whole, atol=1e-3)
    described = hash_of_model(folder / "end2end.onnx")
    weights = max(folder.iterdir(), key=lambda path: path.stat().st_size * (path.suffix != ".onnx"))
    changed = bytearray(weights.read_bytes())
    changed[0] ^= 1
    weights.write_bytes(changed)
    assert half_precision(folder / "end2end.onnx") != made
    assert hash_of_model(folder / "end2end.onnx") != described  # so that a run with other weights is refused
    weights.unlink()
    with pytest.raises(ValueError, match=r"end2end\.onnx: its weights are in other files, of which .* is missing"):
        half_precision(folder / "end2end.onnx")


def test_a_cache_that_is_a_file_is_an_error(cache):
    cache.write_text("no folder")
    with pytest.raises(ValueError, match=r"fp16: the half-precision network cannot be written .*; set WAN_ACCEL_CACHE"):
        half_precision(MODELS.segmenter)


def test_the_cache_is_the_users_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("WAN_ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "wan-accel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/wan-accel"


def test_clips_in_half_precision_are_close_and_say_so():
    video = DEMO / "videos/walker.mp4"
    ((full,), (half,)) = (process(pipeline(fp16=fp16, max_clips=1), video) for fp16 in (False, True))
    assert '"fp16": true' in half["provenance"] and '"fp16": false' in full["provenance"]
    assert half["settings_hash"] != full["settings_hash"]
    np.testing.assert_allclose(half["boxes"], full["boxes"], atol=1)
    assert np.median(np.abs(np.subtract(half["keypoints"], full["keypoints"]))) < 0.1
