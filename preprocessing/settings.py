"""What a run of `wan-preprocess` is given: settings, model files, how networks run; checked before work starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from preprocessing.thresholds import Bound
from preprocessing.types import PROFILES, ChannelOrder, PreprocessProfile
from preprocessing.windows import People

Kind = Literal["animate", "clips"]
Purpose = Literal["train", "drive"]
SegmenterKind = Literal["onnx", "sam2", "transformers"]
Retarget = Literal["none", "one_step", "two_step"]
AUTOMATIC_REFERENCES = ("auto", "first", "column")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run does. Everything here makes the clips what they are, so it is compared on resuming.

    kind: `animate` finds people, `clips` only cuts. num_frames: frames of a clip, 4n + 1; stride: frames from one
        clip's start to the next's, by default num_frames. fps: rate of the clips. area: pixels of a frame, at most;
        divisor: of height and width. max_clips: clips of a video, at most; the rest of it is not looked at.
    people: `largest` gives one clip a stretch of time, `all` one for every person in it.
    reference: `auto` takes the best-scored frame of the clip's own track outside the clip where there is one,
        `first` the track's first frame, `column` the picture that the manifest names; otherwise a picture file.
    retarget: fit the pose to the reference's proportions: `one_step` measures bones in the video and the reference,
        `two_step` in pictures of both people in a standard pose: edited_template and edited_reference, or the
        manifest's, or else made by the FLUX.1-Kontext pipeline in the folder `flux`.
    pose_channel_order: what the pose network sees; by default the profile's. fp16: ONNX networks in half precision.
    quality: bounds of figures, by name; a clip outside one is rejected.
    """

    kind: Kind = "animate"
    purpose: Purpose = "train"
    people: People = "largest"
    reference: str = "auto"
    retarget: Retarget = "none"
    edited_template: str | None = None
    edited_reference: str | None = None
    flux: str | None = None
    flux_seed: int = 0
    caption: str = ""
    num_frames: int = 77
    stride: int | None = None
    fps: float = 30.0
    area: int = 480 * 832
    divisor: int = 16
    max_clips: int | None = None
    profile: str = "wan"
    pose_channel_order: ChannelOrder | None = None
    segmenter: SegmenterKind = "onnx"
    fp16: bool = False
    quality: Mapping[str, Bound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._reference_problems()]
        if self.profile not in PROFILES:
            problems.append(f"--profile {self.profile} is unknown: use {' or '.join(PROFILES)}")
        if problems:
            raise ValueError("; ".join(problems))

    def _number_problems(self) -> list[str]:
        problems = []
        if not self.fps > 0:
            problems.append(f"--fps {self.fps:g}: give a positive number of frames a second")
        if self.max_clips is not None and self.max_clips < 1:
            problems.append(f"--max-clips {self.max_clips}: give 1 or more, or leave it out for all clips")
        if self.stride is not None and self.stride < 1:
            problems.append(f"--stride {self.stride}: give 1 or more frames, or leave it out for clips end to end")
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            near = max(5, round((self.num_frames - 1) / 4) * 4 + 1)
            problems.append(f"--num-frames {self.num_frames} is not 4n + 1: use {near}")
        return problems

    def _reference_problems(self) -> list[str]:
        problems = []
        is_drive = self.purpose == "drive"
        if is_drive and self.reference in ("auto", "first"):
            problems.append(
                "--purpose drive needs the picture of the character: give --reference FILE, or --reference column "
                "with a manifest"
            )
        if not is_drive and self.retarget != "none":
            problems.append("--retarget is for --purpose drive: training clips show the person that moves")
        edits = ("edited_template", "edited_reference", "flux")
        if self.retarget != "two_step" and (given := [name for name in edits if getattr(self, name) is not None]):
            problems.append(f"--{given[0].replace('_', '-')} is for --retarget two-step")
        if not is_drive and self.reference not in AUTOMATIC_REFERENCES:
            problems.append(
                f"--reference {self.reference} is for --purpose drive: use auto or first, the same person, or column"
            )
        return problems

    @property
    def step_frames(self) -> int:
        """Frames from one clip's start to the next's."""
        return self.stride or self.num_frames

    @property
    def behaviour(self) -> PreprocessProfile:
        """The profile, with what was chosen apart from it."""
        profile = PROFILES[self.profile]
        return replace(profile, pose_channel_order=self.pose_channel_order or profile.pose_channel_order)

    def described(self) -> dict[str, Any]:
        """The settings as they are stored and compared."""
        quality = {name: asdict(bound) for name, bound in self.quality.items()}
        return {**asdict(self), "quality": quality, "pose_channel_order": self.behaviour.pose_channel_order}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Files of the networks."""

    detector: Path
    pose: Path
    segmenter: Path

    def check(self) -> None:
        """Raise ValueError for a file that is not there."""
        for name, path in asdict(self).items():
            if not path.exists():
                raise ValueError(
                    f"--{name} {path}: no such file. The demo's small networks are in demo/models; the released "
                    "ones are fetched by `wan-preprocess download`"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How networks run: it changes how fast clips come, not what they are (but for the last bits).

    provider: of onnxruntime; device_id: its GPU. num_threads: of the CPU for one network, 0 for all cores.
    batch_frames: frames that a network takes at a time; None: what suits the provider. edits: folder for pictures
        that are edited on the way.
    """

    provider: str = "cpu"
    device_id: int = 0
    num_threads: int = 1
    batch_frames: int | None = None
    edits: Path | None = None

    @property
    def network_batch(self) -> int:
        """Frames that a network takes at a time: on a CPU more make it no faster, and need 50 MB each."""
        default = 2 if self.provider == "cpu" else 16
        return default if self.batch_frames is None else self.batch_frames

    @property
    def torch_device(self) -> str:
        """Where networks that are no ONNX files run."""
        return "cpu" if self.provider == "cpu" else f"cuda:{self.device_id}"
