from pathlib import Path

import numpy as np
import pytest
from small_runs import MODELS

from preprocessing.box_segmenter import BoxSegmenter
from preprocessing.networks import open_detector, open_pose
from preprocessing.onnx_model import OnnxModel

SEGMENTER = MODELS.segmenter  # its batch size is fixed at 1


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"net\.onnx: no such model file"):
        OnnxModel(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(SEGMENTER.read_bytes()[:10_000])
    for fp16 in (False, True):
        with pytest.raises(ValueError, match=r"net\.onnx: not a complete ONNX model"):
            OnnxModel(tmp_path / "net.onnx", fp16=fp16)


def test_a_fixed_batch_size_is_respected():
    model = OnnxModel(SEGMENTER, batch_frames=8)
    assert model.batch_frames == 1
    with pytest.raises(ValueError, match=r"2 inputs for person_segmenter\.onnx, it takes 1 at a time"):
        model.run(np.zeros((2, 256, 256, 3), np.float32))


@pytest.mark.parametrize(
    ("opening", "file", "message"),
    [
        (open_detector, "wholebody133.onnx", r"\(a pose network of 133 key points\?\); a person detector has input"),
        (open_pose, "person_detector.onnx", r"\(a detector\?\); a whole-body pose network has input \(N, 3, H, W\)"),
        (open_pose, "person_segmenter.onnx", r"input \(1, 256, 256, 3\); a whole-body pose network has input"),
        (BoxSegmenter, "wholebody133.onnx", r"a person segmenter has input \(N, S, S, 3\)"),
    ],
)
def test_networks_that_were_mixed_up_are_told_apart(opening, file, message):
    with pytest.raises(ValueError, match=message):
        opening(Path(SEGMENTER).parent / file)
