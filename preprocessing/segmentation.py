"""Segmenters: who is where, pixel by pixel, in a window of frames."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, Unpack, get_args

from preprocessing.box_segmenter import BoxSegmenter
from preprocessing.masks import Mask
from preprocessing.onnx_model import NetworkOptions
from preprocessing.types import WAN, Frames, Person, PreprocessProfile
from preprocessing.video_segmenter import VideoSegmenter

SegmenterKind = Literal["onnx", "sam2", "transformers"]


class Segmenter(Protocol):
    """Gives the (T, H, W) mask of `person` in (T, H, W, 3) frames, knowing the others in them."""

    def __call__(self, frames_rgb: Frames, person: Person, others: Sequence[Person] = ()) -> Mask: ...

    @property
    def seconds_in_network(self) -> float:
        """How long the network has run in all."""


def kind_of_segmenter(path: Path) -> SegmenterKind:
    """Tell a segmenter by its file: ONNX, a SAM2 checkpoint, or a transformers folder."""
    if path.is_dir():
        return "transformers"
    return "sam2" if path.suffix in (".pt", ".pth") else "onnx"


def check_kind(given: Path | None, found: Path | None) -> bool:
    """Say whether `given` is the name of a kind, which the file `found` is of; raises ValueError where it is not."""
    if given is None or str(given) not in get_args(SegmenterKind) or given.exists():
        return False
    if found is None or kind_of_segmenter(found) != str(given):
        there = f"{found} is a segmenter of kind {kind_of_segmenter(found)}" if found else "no file is known"
        raise ValueError(
            f"--segmenter {given}: {there}; give the file: an .onnx network, a SAM2 checkpoint (.pt, by "
            "`wan-preprocess download`), or a folder of a transformers Sam2VideoModel"
        )
    return True


def open_segmenter(
    kind: SegmenterKind,
    path: Path,
    *,
    device: str = "cpu",
    profile: PreprocessProfile = WAN,
    **options: Unpack[NetworkOptions],
) -> Segmenter:
    """Open a segmenter: `onnx` with the options of its network, the others on a torch device.

    Raises ValueError for a file of another kind.
    """
    if kind == "onnx":
        return BoxSegmenter(path, **options)
    if kind == "sam2":
        from preprocessing.sam2_video import Sam2Propagator

        return VideoSegmenter(Sam2Propagator(path, device=device), profile=profile)
    from preprocessing.sam2_transformers import Sam2TransformersPropagator

    return VideoSegmenter(Sam2TransformersPropagator(path, device=device), profile=profile)
