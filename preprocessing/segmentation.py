"""Segmenters: who is where, pixel by pixel, in a window of frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from preprocessing.masks import Mask, OnnxPersonSegmenter
from preprocessing.types import Float, Frames

SegmenterKind = Literal["onnx", "sam2", "transformers"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Person:
    """One tracked person through T frames: boxes (T, 5), score below 0 where absent; key points (T, 133, 3) or None."""

    boxes_xyxys: Float
    keypoints: Float | None


class Segmenter(Protocol):
    """Gives the (T, H, W) mask of `person` in (T, H, W, 3) frames, knowing the others in them."""

    def __call__(self, frames_rgb: Frames, person: Person, others: Sequence[Person] = ()) -> Mask: ...


class BoxSegmenter:
    """The ONNX segmenter, which sees one box of one frame at a time."""

    def __init__(self, network: OnnxPersonSegmenter) -> None:
        self._network = network

    def __call__(self, frames_rgb: Frames, person: Person, others: Sequence[Person] = ()) -> Mask:
        """Segment the person's boxes; others play no part."""
        return self._network(frames_rgb, person.boxes_xyxys)


def kind_of_segmenter(path: Path) -> SegmenterKind:
    """Tell a segmenter by its file: ONNX, a SAM2 checkpoint, or a transformers folder."""
    if path.is_dir():
        return "transformers"
    return "sam2" if path.suffix in (".pt", ".pth") else "onnx"


def open_segmenter(
    kind: SegmenterKind, path: Path, *, provider: str = "cpu", num_threads: int = 1, device: str = "cpu"
) -> Segmenter:
    """Open a segmenter. Raises ValueError for a file of another kind."""
    if kind != "onnx":
        raise ValueError(f"--segmenter {path}: {kind} segmenters are not supported yet; give an ONNX person segmenter")
    return BoxSegmenter(OnnxPersonSegmenter(path, provider=provider, num_threads=num_threads))
