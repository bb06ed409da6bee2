"""What a run of `wan-preprocess animate` is given: settings, model files, videos; all checked before work starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from preprocessing.types import PROFILES

Purpose = Literal["train", "drive"]
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run does. Everything here makes the clips what they are, so it is compared on resuming.

    num_frames: frames of a clip, 4n + 1. fps: rate of the clips. area: pixels of a frame, at most. max_clips: clips
        of a video, at most; the rest of it is not looked at.
    reference: `auto` takes the best-scored frame of the clip's own track outside the clip where there is one,
        `first` the video's first frame with the person; otherwise a picture file.
    """

    purpose: Purpose = "train"
    reference: str = "auto"
    retarget: bool = False
    caption: str = ""
    num_frames: int = 77
    fps: float = 30.0
    area: int = 480 * 832
    max_clips: int | None = None
    profile: str = "wan"

    def __post_init__(self) -> None:
        problems = []
        if self.profile not in PROFILES:
            problems.append(f"--profile {self.profile} is unknown: use {' or '.join(PROFILES)}")
        if not self.fps > 0:
            problems.append(f"--fps {self.fps:g}: give a positive number of frames a second")
        if self.max_clips is not None and self.max_clips < 1:
            problems.append(f"--max-clips {self.max_clips}: give 1 or more, or leave it out for all clips")
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            near = max(5, round((self.num_frames - 1) / 4) * 4 + 1)
            problems.append(f"--num-frames {self.num_frames} is not 4n + 1: use {near}")
        if self.purpose == "drive" and self.reference in ("auto", "first"):
            problems.append("--purpose drive needs the picture of the character: give --reference FILE")
        if self.purpose == "train" and self.retarget:
            problems.append("--retarget is for --purpose drive: training clips show the person that moves")
        if self.purpose == "train" and self.reference not in ("auto", "first"):
            problems.append(
                f"--reference {self.reference} is for --purpose drive: use auto or first, the same person"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """ONNX files of the networks."""

    detector: Path
    pose: Path
    segmenter: Path

    def check(self) -> None:
        """Raise ValueError for a file that is not there."""
        for name, path in asdict(self).items():
            if not path.exists():
                raise ValueError(
                    f"--{name} {path}: no such file. The demo's small networks are in demo/models; the released "
                    "ones are in process_checkpoint/ of Wan-AI/Wan2.2-Animate-14B"
                )


def find_videos(inputs: Sequence[Path]) -> list[Path]:
    """Files as given and all videos below folders, in order, each once.

    Raises ValueError for an input that does not exist, or a folder without videos.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
            if not inside:
                raise ValueError(f"{path} holds no videos ({', '.join(VIDEO_ENDINGS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return list({path.resolve(): path for path in found}.values())
