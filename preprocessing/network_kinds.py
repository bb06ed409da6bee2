"""Detectors and pose networks of several kinds, told apart by what their ONNX files say and give."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocessing.onnx_model import OnnxModel
from preprocessing.pose import NUM_KEYPOINTS
from preprocessing.types import Float
from preprocessing.yolo import num_cells, rows_from_labelled, rows_from_yolov8, rows_from_yolox
from wan_accel.listing import first_few

Shape = tuple[Any, ...]  # ("N", ...): the batch comes first
_LEAST_CELL_ROWS = 1000  # YOLOv10 gives a few hundred rows, a grid of cells thousands


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorKind:
    """How a detector is recognised by its outputs' shapes (and input height, width), fed and read.

    keeps_aspect: frames go in with grey borders, BGR 0..255; otherwise stretched, RGB 0..1.
    rows: turns its outputs into (N, R, 6) x1, y1, x2, y2, score, class in pixels of its input.
    num_classes: how many it tells apart, by its outputs' shapes; None where they do not say.
    """

    name: str
    outputs: str
    fits: Callable[[list[Shape], tuple[int, int]], bool]
    keeps_aspect: bool
    rows: Callable[[list[Float], tuple[int, int]], Float]
    num_classes: Callable[[list[Shape]], int | None] = lambda shapes: None


DETECTOR_KINDS = (
    DetectorKind(
        name="YOLOX or RTMDet by mmdeploy", outputs="(N, R, 5) and (N, R)",
        fits=lambda shapes, hw: len(shapes) >= 2 and _ends(shapes[0], 3, 5) and len(shapes[1]) == 2,
        keeps_aspect=True, rows=lambda outputs, hw: rows_from_labelled(outputs[0], outputs[1]),
    ),
    DetectorKind(
        name="YOLOX", outputs="(N, cells, 5 + C)",
        fits=lambda shapes, hw: len(shapes[0]) == 3 and shapes[0][1] == num_cells(hw) and shapes[0][2] >= 6,
        keeps_aspect=True, rows=lambda outputs, hw: rows_from_yolox(outputs[0], hw),
        num_classes=lambda shapes: shapes[0][2] - 5,
    ),
    DetectorKind(
        name="YOLOv8", outputs="(N, 4 + C, cells)",
        fits=lambda shapes, hw: [len(s) for s in shapes] == [3] and shapes[0][2] == num_cells(hw) and shapes[0][1] >= 5,
        keeps_aspect=False, rows=lambda outputs, hw: rows_from_yolov8(outputs[0]),
        num_classes=lambda shapes: shapes[0][1] - 4,
    ),
    DetectorKind(
        name="YOLOv10", outputs="(N, R, 6)",
        fits=lambda shapes, hw: _ends(shapes[0], 3, 6) and shapes[0][1] < _LEAST_CELL_ROWS,
        keeps_aspect=False, rows=lambda outputs, hw: outputs[0],
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PoseKind:
    """How a pose network is recognised by its outputs' shapes; `axes`: of SimCC, 0: heat maps."""

    name: str
    outputs: str
    axes: int


POSE_KINDS = (
    PoseKind(name="ViTPose", outputs=f"heat maps (N, {NUM_KEYPOINTS}, h, w)", axes=0),
    PoseKind(name="RTMPose, RTMW or DWPose", outputs=f"two SimCC outputs (N, {NUM_KEYPOINTS}, bins)", axes=2),
    PoseKind(name="RTMW3D", outputs=f"three SimCC outputs (N, {NUM_KEYPOINTS}, bins)", axes=3),
)


def detector_kind(model: OnnxModel, hw: tuple[int, int]) -> DetectorKind:
    """Recognise a person detector by running it on one grey picture; `hw`: of its input.

    Raises ValueError, naming the kinds there are, for another network, and for a detector that does not find people.
    """
    outputs = _run_on_grey(model, hw, "person detector", DETECTOR_KINDS)
    shapes = _shapes(outputs)
    kind = next((kind for kind in DETECTOR_KINDS if kind.fits(shapes, hw)), None)
    if kind is None:
        raise ValueError(_unknown(model, shapes, "person detector", DETECTOR_KINDS))
    _check_classes(model, kind, shapes)
    best = kind.rows(outputs, hw)[..., 4].max(initial=0)
    if best > 1.01:
        raise ValueError(
            f"{model.path}: read as {kind.name} it gives scores up to {best:.4g}, which lie in 0..1; it looks like a "
            "network for another task, such as key points or segments"
        )
    return kind


def pose_kind(model: OnnxModel, hw: tuple[int, int]) -> PoseKind:
    """Recognise a whole-body pose network likewise. Raises ValueError for another network or other key points."""
    shapes = _shapes(_run_on_grey(model, hw, "whole-body pose network", POSE_KINDS))
    if all(len(shape) >= 3 and shape[1] == NUM_KEYPOINTS for shape in shapes):
        axes = 0 if len(shapes[0]) == 4 else len(shapes)
        for kind in POSE_KINDS:
            if kind.axes == axes:
                return kind
    raise ValueError(_unknown(model, shapes, "whole-body pose network", POSE_KINDS))


def _run_on_grey(
    model: OnnxModel, hw: tuple[int, int], what: str, kinds: Sequence[DetectorKind | PoseKind]
) -> list[Float]:
    """What the file says of its outputs may be names or nothing; what it gives are numbers."""
    if len(model.input_shape) != 4 or model.input_shape[1] != 3:
        raise ValueError(_unknown(model, [], what, kinds))
    outputs = model.run_all(np.full((1, 3, *hw), 0.5, np.float32))
    model.seconds_in_network = 0.0
    return outputs


def _shapes(outputs: list[Float]) -> list[Shape]:
    return [("N", *output.shape[1:]) for output in outputs]


def _check_classes(model: OnnxModel, kind: DetectorKind, shapes: list[Shape]) -> None:
    """Compare with the classes that exporters note in the file (`names`, as ultralytics does)."""
    names = _class_names(model.metadata.get("names"))
    if not names:
        return
    listed = first_few(names, 5)
    num_classes = kind.num_classes(shapes)
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"{model.path}: its file names {len(names)} classes ({listed}), but as {kind.name} its output "
            f"{shapes[0]} has {num_classes}: it is a network for another task or of another kind"
        )
    if names[0].lower() != "person":
        raise ValueError(
            f"{model.path}: its classes are {listed}; class 0 of a person detector is `person`, as in COCO"
        )


def _class_names(noted: str | None) -> list[str]:
    """['person', 'bicycle'] of "{0: 'person', 1: 'bicycle'}" or a list; [] for anything else."""
    try:
        names = ast.literal_eval(noted or "")
    except (SyntaxError, ValueError):
        return []
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names)]
    return [str(name) for name in names] if isinstance(names, list) else []


def _ends(shape: Shape, num_dims: int, last: int) -> bool:
    return len(shape) == num_dims and shape[-1] == last


def _unknown(model: OnnxModel, shapes: list[Shape], what: str, kinds: Sequence[DetectorKind | PoseKind]) -> str:
    known = "; ".join(f"{kind.name}: {kind.outputs}" for kind in kinds)
    given = f"input {model.input_shape}" + (f", outputs {', '.join(map(str, shapes))}" if shapes else "")
    return (
        f"{model.path}: {given}{_looks_like(shapes)}; a {what} has input (N, 3, H, W) and outputs like one of these: "
        f"{known}"
    )


def _looks_like(shapes: list[Shape]) -> str:
    """What a network may be that is none of the kinds."""
    if not shapes:
        return ""
    first = shapes[0]
    if all(len(shape) == 2 for shape in shapes):
        return " (a classification network?)"
    if len(first) == 4 or (len(first) == 3 and len(shapes) > 1 and len({shape[1] for shape in shapes}) == 1):
        return f" (a pose network of {first[1]} key points?)"
    return " (a detector?)" if first[-1] in (5, 6) else ""
