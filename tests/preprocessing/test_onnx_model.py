from pathlib import Path

import numpy as np
import pytest

from preprocessing.box_segmenter import BoxSegmenter
from preprocessing.detection import PersonDetector
from preprocessing.onnx_model import OnnxModel
from preprocessing.pose import WholeBodyPose

MODELS = Path(__file__).parents[2] / "demo/models"
SEGMENTER = MODELS / "person_segmenter.onnx"  # its batch size is fixed at 1


def test_a_provider_that_is_absent_is_an_error():
    with pytest.raises(ValueError, match=r"provider 'rocm' is not in this onnxruntime, which has .*CPUExec"):
        OnnxModel(SEGMENTER, provider="rocm")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"net\.onnx: no such model file"):
        OnnxModel(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(SEGMENTER.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"net\.onnx: not a complete ONNX model"):
        OnnxModel(tmp_path / "net.onnx")


def test_a_fixed_batch_size_is_respected():
    model = OnnxModel(SEGMENTER, batch_frames=8)
    assert model.batch_frames == 1
    with pytest.raises(ValueError, match=r"2 inputs for person_segmenter\.onnx, it takes 1 at a time"):
        model.run(np.zeros((2, 256, 256, 3), np.float32))


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        (PersonDetector, "wholebody133.onnx", r"a person detector has input \(N, 3, H, W\)"),
        (WholeBodyPose, "person_detector.onnx", r"a whole-body pose network has"),
        (BoxSegmenter, "wholebody133.onnx", r"a person segmenter has input \(N, S, S, 3\)"),
    ],
)
def test_networks_that_were_mixed_up_are_told_apart(kind, file, message):
    with pytest.raises(ValueError, match=message):
        kind(MODELS / file)
