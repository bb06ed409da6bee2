import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_runs import DEMO, MODELS, main_people, part_of, pipeline, process

from preprocessing.networks import open_detector, open_pose
from preprocessing.pose import crops_of_boxes
from preprocessing.simcc import DEPTH_RANGE_METRES, simcc_input
from preprocessing.types import PROFILES
from preprocessing.video import decode_frames
from preprocessing.yolo import letterbox_bgr, num_cells

DETECTOR_HW = (64, 96)
POSE_HW = (64, 48)


def constant_network(path: Path, input_hw, outputs, *, half: bool = False, batch="N") -> Path:
    """A network (batch, 3, H, W) whose outputs are these arrays without a batch, the same for every picture."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    nodes = [helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    nodes += [helper.make_node("Mul", ["mean", "zero"], ["nothing"])]
    initial = [numpy_helper.from_array(np.zeros(1, dtype), "zero")]
    described = []
    for number, value in enumerate(outputs):
        shape = [-1] + [1] * value.ndim
        initial += [
            numpy_helper.from_array(value[None].astype(dtype), f"value{number}"),
            numpy_helper.from_array(np.array(shape, np.int64), f"shape{number}"),
        ]
        nodes += [
            helper.make_node("Reshape", ["nothing", f"shape{number}"], [f"zeros{number}"]),
            helper.make_node("Add", [f"zeros{number}", f"value{number}"], [f"output{number}"]),
        ]
        described.append(helper.make_tensor_value_info(f"output{number}", kind, [batch, *value.shape]))
    pictures = helper.make_tensor_value_info("input", kind, [batch, 3, *input_hw])
    graph = helper.make_graph(nodes, "constant", [pictures], described, initial)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def frames(num: int, hw=(128, 96)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (num, *hw, 3), dtype=np.uint8)


def yolox_output() -> np.ndarray:
    """A person of 16x32 around (28, 20), a dog elsewhere, and nothing in all other cells."""
    output = np.full((num_cells(DETECTOR_HW), 7), -9.0, np.float32)
    output[:, 4:] = 0
    columns = DETECTOR_HW[1] // 8
    # In the grid of stride 8: centre = (offset + cell) * 8, size = exp(log size) * 8.
    output[2 * columns + 3] = [0.5, 0.5, np.log(2), np.log(4), 0.9, 0.8, 0.1]
    output[5 * columns + 9] = [0.5, 0.5, np.log(2), np.log(2), 0.9, 0.1, 0.8]
    return output


def test_yolox_cells_become_people_in_frame_pixels(tmp_path):
    detector = open_detector(constant_network(tmp_path / "yolox.onnx", DETECTOR_HW, [yolox_output()]))
    assert detector.kind.name == "YOLOX"
    # 128x96 frames in a 64x96 input: scale 0.5, so the box (20, 4)-(36, 36) is twice as large in the frame.
    for people in detector.people(frames(3)):
        np.testing.assert_allclose(people, [[40, 8, 72, 72, 0.72]], rtol=1e-5)


def test_yolov8_rows_are_stretched_back(tmp_path):
    output = np.zeros((6, num_cells(DETECTOR_HW)), np.float32)
    output[:, 7] = [48, 32, 20, 40, 0.6, 0.2]  # centre, size, person, other
    output[:, 8] = [10, 10, 8, 8, 0.2, 0.7]
    detector = open_detector(constant_network(tmp_path / "yolov8.onnx", DETECTOR_HW, [output]))
    assert detector.kind.name == "YOLOv8"
    np.testing.assert_allclose(detector.people(frames(1))[0], [[38, 24, 58, 104, 0.6]], rtol=1e-5)


def test_boxes_with_labels_are_mmdeploys(tmp_path):
    boxes = np.array([[10, 5, 30, 45, 0.8], [50, 5, 60, 45, 0.9]], np.float32)
    path = constant_network(tmp_path / "end2end.onnx", DETECTOR_HW, [boxes, np.array([0.0, 2.0])])
    detector = open_detector(tmp_path)  # mmdeploy writes folders
    assert (detector.kind.name, path.name) == ("YOLOX or RTMDet by mmdeploy", "end2end.onnx")
    np.testing.assert_allclose(detector.people(frames(1))[0], [[20, 10, 60, 90, 0.8]], rtol=1e-5)


def test_letterboxed_frames_keep_their_aspect_and_come_in_bgr():
    red = np.zeros((1, 100, 50, 3), np.uint8)
    red[..., 0] = 200
    box = letterbox_bgr(red, (64, 96))
    assert (box.pixels.shape, box.scale) == ((1, 3, 64, 96), 0.64)
    assert box.pixels[0, :, :64, :32].reshape(3, -1).max(axis=1).tolist() == [0, 0, 200]
    assert (box.pixels[0, :, :, 32:] == 114).all()


@pytest.fixture(scope="module")
def walker():
    return decode_frames(DEMO / "videos/walker.mp4", range(5)).frames_rgb


def test_the_demos_networks_are_recognised_and_used(walker):
    detector, pose = open_detector(MODELS.detector), open_pose(MODELS.pose)
    assert (detector.kind.name, pose.kind.name) == ("YOLOv10", "ViTPose")
    assert detector.seconds_in_network == pose.seconds_in_network == 0  # opening does not count
    boxes = main_people(detector, walker)
    boxes[2, 4] = -1
    measured = pose(list(walker), boxes)
    assert measured.keypoints_3d is None and np.isnan(measured.keypoints[2, :, :2]).all()
    nose = measured.keypoints[[0, 1, 3, 4], 0, :2]
    assert ((boxes[[0, 1, 3, 4], :2] < nose) & (nose < boxes[[0, 1, 3, 4], 2:4])).all()
    assert detector.seconds_in_network > 0 and pose.seconds_in_network > 0


def test_several_people_of_one_frame_go_in_one_batch(walker):
    pose = open_pose(MODELS.pose)
    (person,) = (people[0] for people in open_detector(MODELS.detector).people(walker[:1]))
    other = person + [5, 5, -5, -5, 0]
    both = pose([walker[0]] * 2, np.stack([person, other])).keypoints
    for found, box in zip(both, (person, other), strict=True):
        alone = pose(walker[:1], box[None]).keypoints[0]
        np.testing.assert_allclose(found[:17], alone[:17], atol=0.05)


def simcc_outputs():
    """Peaks of point k at (k mod 90, k mod 120) half pixels of the input; point 5 was not found."""
    k = np.arange(133)
    x, y, z = np.zeros((133, 96)), np.zeros((133, 128)), np.zeros((133, 96))
    x[k, k % 90], y[k, k % 120], z[k, (2 * k) % 96] = 0.9, 0.7, 0.4
    x[5] = -0.1
    return k, x, y, z


@pytest.mark.parametrize(("half", "batch"), [(False, "N"), (True, "N"), (False, 2)])
def test_simcc_peaks_become_points(tmp_path, half, batch):
    k, x, y, _ = simcc_outputs()
    pose = open_pose(constant_network(tmp_path / "rtmw.onnx", POSE_HW, [x, y], half=half, batch=batch))
    assert pose.kind.name == "RTMPose, RTMW or DWPose"
    boxes = np.array([[10, 20, 70, 100, 0.9]] * 3)
    crops = crops_of_boxes(boxes, (128, 96), input_hw=POSE_HW)
    corner, gain = crops.center_xy[0] - crops.size_wh[0] / 2, crops.size_wh[0] / [48, 64]
    measured = pose(frames(3), boxes)
    found = k != 5
    for points in measured.keypoints:
        expected = corner + np.stack([(k % 90) / 2, (k % 120) / 2], axis=1) * gain
        np.testing.assert_allclose(points[found, :2], expected[found], atol=1e-4)
        np.testing.assert_allclose(points[found, 2], 0.7, atol=1e-3)
        assert np.isnan(points[5, :2]).all() and points[5, 2] == 0
    assert measured.keypoints_3d is None


def test_a_third_output_is_depth(tmp_path):
    k, x, y, z = simcc_outputs()
    pose = open_pose(constant_network(tmp_path / "rtmw3d.onnx", POSE_HW, [x, y, z]))
    assert pose.kind.name == "RTMW3D"
    measured = pose(frames(1), np.array([[10, 20, 70, 100, 0.9]]))
    depth = measured.keypoints_3d[0, :, 2]
    expected = ((2 * k) % 96 / 48 - 1) * DEPTH_RANGE_METRES
    np.testing.assert_allclose(depth[k != 5], expected[k != 5], atol=1e-5)
    assert np.isnan(depth[5])
    np.testing.assert_array_equal(measured.keypoints_3d[..., [0, 1, 3]], measured.keypoints)


def test_simcc_crops_are_centred_and_normalised():
    frame = np.zeros((1, 128, 96, 3), np.uint8)
    frame[0, 60:68, 44:52] = [250, 120, 10]
    crops = crops_of_boxes(np.array([[28, 44, 68, 84, 0.9]]), (128, 96), input_hw=POSE_HW)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for name, color in (("wan", [250, 120, 10]), ("upstream", [10, 120, 250])):
        batch = simcc_input(frame, crops, input_hw=POSE_HW, profile=PROFILES[name])
        assert batch.shape == (1, 3, *POSE_HW)
        np.testing.assert_allclose(batch[0, :, 32, 24], (np.array(color) / 255 - mean) / std, atol=0.02)
        np.testing.assert_allclose(batch[0, :, 0, 0], -mean / std, atol=1e-5)


def test_networks_that_take_one_picture_at_a_time_work(tmp_path):
    detector = open_detector(constant_network(tmp_path / "yolox.onnx", DETECTOR_HW, [yolox_output()], batch=1))
    assert [len(people) for people in detector.people(frames(3))] == [1, 1, 1]
    maps = np.zeros((133, 16, 12))
    maps[:, 8, 6] = 0.9
    pose = open_pose(constant_network(tmp_path / "vitpose.onnx", POSE_HW, [maps], batch=1))
    measured = pose(frames(3), np.array([[10, 20, 70, 100, 0.9]] * 3)).keypoints
    np.testing.assert_array_equal(measured[1:], measured[:2])
    np.testing.assert_allclose(measured[..., 2], 0.9, rtol=1e-6)


@pytest.mark.parametrize("opening", [open_detector, open_pose])
def test_an_unknown_network_is_refused_with_the_known_kinds(tmp_path, opening):
    path = constant_network(tmp_path / "other.onnx", (64, 64), [np.zeros((4, 3))])
    with pytest.raises(
        ValueError, match=r"other\.onnx: input \('N', 3, 64, 64\), outputs \('N', 4, 3\); a .* one of these: "
    ):
        opening(path)


BODY17 = [np.zeros((17, 16, 12))]
SIMCC17 = [np.zeros((17, 96)), np.zeros((17, 128))]
ANCHORS = num_cells(DETECTOR_HW)


@pytest.mark.parametrize(
    ("opening", "outputs", "message"),
    [
        (open_pose, BODY17, r"\(a pose network of 17 key points\?\); a whole-body .*ViTPose: heat maps \(N, 133"),
        (open_pose, SIMCC17, r"\(a pose network of 17 key points\?\); a whole-body .*RTMW3D: three SimCC outputs"),
        (open_pose, [np.zeros(1000)], r"\(a classification network\?\); a whole-body pose network has"),
        (open_detector, [np.zeros(1000)], r"\(a classification network\?\); a person detector .*YOLOv10: \(N, R, 6\)"),
        (open_detector, BODY17, r"\(a pose network of 17 key points\?\); a person detector has"),
    ],
)
def test_a_network_for_another_task_is_called_what_it_may_be(tmp_path, opening, outputs, message):
    with pytest.raises(ValueError, match=message):
        opening(constant_network(tmp_path / "other.onnx", DETECTOR_HW, outputs))


def noting(path: Path, **notes: str) -> Path:
    """Note something in the file, as exporters do."""
    model = onnx.load(path)
    helper.set_model_props(model, notes)
    onnx.save(model, path)
    return path


def test_a_size_that_the_file_leaves_open_is_found_out(tmp_path):
    """`torch.onnx.export` with dynamic axes names sizes; 17 key points are seen all the same."""
    path = constant_network(tmp_path / "open.onnx", POSE_HW, BODY17)
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "keypoints"
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"outputs \('N', 17, 16, 12\) \(a pose network of 17 key points"):
        open_pose(path)


def test_a_detector_without_people_is_refused_by_its_classes(tmp_path):
    output = np.zeros((6, ANCHORS))
    path = constant_network(tmp_path / "cars.onnx", DETECTOR_HW, [output])
    open_detector(noting(path, names="{0: 'person', 1: 'car'}"))
    with pytest.raises(ValueError, match=r"cars\.onnx: its classes are car, person; class 0 of a person detector is"):
        open_detector(noting(path, names="{0: 'car', 1: 'person'}"))
    with pytest.raises(ValueError, match=r"names 3 classes \(a, b, c\), but as YOLOv8 its output .* has 2"):
        open_detector(noting(path, names="['a', 'b', 'c']"))
    open_detector(noting(path, names="person"))  # no list of classes, so nothing to compare


def test_a_network_of_the_same_shape_for_another_task_is_noticed_by_its_scores(tmp_path):
    """YOLOv8 for key points gives box, score and 17 x, y, score: the shape of a detector of 52 classes."""
    output = np.zeros((4 + 1 + 17 * 3, ANCHORS))
    output[5::3] = 300
    with pytest.raises(ValueError, match=r"read as YOLOv8 it gives scores up to 300, which lie in 0\.\.1; it looks"):
        open_detector(constant_network(tmp_path / "pose.onnx", DETECTOR_HW, [output]))


def test_the_pose_networks_channel_order_can_be_chosen_apart_from_the_profile(tmp_path):
    video = part_of("walker.mp4", tmp_path / "short.mp4", range(16))
    for profile, default, other in (("wan", "rgb", "bgr"), ("upstream", "bgr", "rgb")):
        plain, same, changed = (
            process(pipeline(profile=profile, pose_channel_order=order, max_clips=1), video)[0]
            for order in (None, default, other)
        )
        assert json.loads(plain["provenance"])["settings"]["pose_channel_order"] == default
        assert json.loads(changed["provenance"])["settings"]["pose_channel_order"] == other
        assert plain["settings_hash"] == same["settings_hash"] != changed["settings_hash"]
        np.testing.assert_array_equal(same["keypoints"], plain["keypoints"])
        np.testing.assert_array_equal(changed["boxes"], plain["boxes"])  # the detector sees RGB all the same
        assert np.median(np.abs(np.subtract(changed["keypoints"], plain["keypoints"])[..., :2])) > 0.2
