"""Detector and pose network end to end, on networks that give the recorded outputs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from preprocess_goldens import UPSTREAM, arrays, full_hw, rolled_frames, strided

from preprocessing.detection import select_person
from preprocessing.networks import open_detector, open_pose
from preprocessing.pose import crops_of_boxes, metas_from_keypoints, pose_input

GOLDEN = arrays("14_pose2d_e2e")
FRAMES = rolled_frames()
FRAME_HW = FRAMES.shape[1:3]
DETECTOR_HW = full_hw(arrays("04_detector"), "input")
POSE_HW = full_hw(GOLDEN, "pose_input")


def recorded_network(path: Path, input_hw: tuple[int, int], output: np.ndarray) -> Path:
    """A network that takes as many pictures as `output` has entries, and gives these for whatever it sees."""
    shape = [len(output), 3, *input_hw]
    pictures = helper.make_tensor_value_info("pictures", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, output.shape)
    nodes = [
        helper.make_node("ReduceMean", ["pictures"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "recorded"], ["result"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(output.astype(np.float32), "recorded"),
    ]
    graph = helper.make_graph(nodes, "recorded", [pictures], [result], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "detector.onnx"
    detector = open_detector(recorded_network(path, DETECTOR_HW, GOLDEN["det_rows"]))
    return np.stack([select_person(people, FRAME_HW) for people in detector.people(FRAMES)])


def test_pose_network_input_matches_the_original(boxes):
    crops = crops_of_boxes(boxes, FRAME_HW, input_hw=POSE_HW)
    batch = pose_input(FRAMES, crops, input_hw=POSE_HW, profile=UPSTREAM)
    expected, stride = strided(GOLDEN, "pose_input")
    np.testing.assert_allclose(batch[:, :, ::stride, ::stride], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(batch.mean(axis=(2, 3)), GOLDEN["pose_input_mean_per_channel"], atol=1e-3)


def test_pose_metas_match_the_original(boxes, tmp_path):
    pose = open_pose(recorded_network(tmp_path / "pose.onnx", POSE_HW, GOLDEN["heatmaps"]), profile=UPSTREAM)
    metas = metas_from_keypoints(pose(FRAMES, boxes).keypoints, FRAME_HW, profile=UPSTREAM)
    for part in ("body", "left_hand", "right_hand", "face"):
        np.testing.assert_allclose(getattr(metas, part), GOLDEN[f"keypoints_{part}"], rtol=0, atol=1e-6)
