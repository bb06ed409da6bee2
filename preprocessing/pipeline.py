"""From videos to clips: the stages in their order, a video at a time; what fails becomes a reason, not a crash."""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocessing.canvas import canvas_hw, cover_resize, resize_by_area
from preprocessing.detection import PersonDetector
from preprocessing.face import crop_faces, face_boxes
from preprocessing.masks import OnnxPersonSegmenter
from preprocessing.pose import WholeBodyPose, hide_low_scores, metas_from_keypoints, pose62
from preprocessing.quality import clip_quality
from preprocessing.retarget import fit_retargeting, retarget, template_frame
from preprocessing.tracking import follow_largest
from preprocessing.types import PROFILES, Float, Frames, PoseMetas
from preprocessing.video import VideoInfo, decode_frames, encode_mp4, probe, sample_indices_by_time, sha256_file
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, clip_id, clips_features, pack_mask

logger = logging.getLogger(__name__)
Purpose = Literal["train", "drive"]
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
SIZE_DIVISOR = 16
REJECTED_FILE = "rejected.jsonl"
FINISHED_FILE = "finished.jsonl"
_TOOLS = ("wan-accel", "onnxruntime", "opencv-python-headless", "decord2", "av", "numpy")


class Rejected(ValueError):
    """A video that gives no clips. `reason` is one word for grouping, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run does. Everything here makes the clips what they are, so it is compared on resuming.

    num_frames: frames of a clip, 4n + 1. fps: rate of the clips. area: pixels of a frame, at most.
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
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            near = max(5, round((self.num_frames - 1) / 4) * 4 + 1)
            problems.append(f"--num-frames {self.num_frames} is not 4n + 1: use {near}")
        if self.purpose == "drive" and self.reference in ("auto", "first"):
            problems.append("--purpose drive needs the picture of the character: give --reference FILE")
        if self.purpose == "train" and self.retarget:
            problems.append("--retarget is for --purpose drive: training clips show the person that moves")
        if self.purpose == "train" and self.reference not in ("auto", "first"):
            problems.append("--reference FILE is for --purpose drive: use auto or first, so that the person is the same")
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
                    f"--{name} {path}: no such file. The demo's small networks are in demo/models; the released ones are "
                    "in process_checkpoint/ of Wan-AI/Wan2.2-Animate-14B"
                )


def find_videos(inputs: Sequence[Path]) -> list[Path]:
    """Files as given and all videos below folders, in order.

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
    return found


class Pipeline:
    """The networks and settings of a run.

    Raises ValueError for a model file that is missing or of another kind, or a reference that is no picture.
    """

    def __init__(self, settings: Settings, models: ModelFiles, *, provider: str = "cpu", num_threads: int = 1) -> None:
        models.check()
        self.settings = settings
        self.profile = PROFILES[settings.profile]
        options: dict[str, Any] = {"provider": provider, "num_threads": num_threads}
        self.detector = PersonDetector(models.detector, **options)
        self.pose = WholeBodyPose(models.pose, profile=self.profile, **options)
        self.segmenter = OnnxPersonSegmenter(models.segmenter, **options)
        self.model_hashes = {name: sha256_file(_onnx_file(path)) for name, path in asdict(models).items()}
        self.character = self._load_character() if settings.purpose == "drive" else None

    def described(self) -> dict[str, Any]:
        """Everything that the clips depend on: compared on resuming, stored as provenance."""
        described = {**asdict(self.settings), "models": self.model_hashes, "schema": CLIPS_SCHEMA}
        if self.settings.purpose == "drive":
            described["reference"] = sha256_file(self.settings.reference)
        return described

    def _load_character(self) -> "Character":
        try:
            with Image.open(self.settings.reference) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise ValueError(f"--reference {self.settings.reference}: not a picture ({error})") from None
        canvas = resize_by_area(pixels, self.settings.area, SIZE_DIVISOR, profile=self.profile)
        metas = None
        if self.settings.retarget:
            box = self.detector(canvas[None])
            if box[0, 4] < 0:
                raise ValueError(f"--reference {self.settings.reference}: no person found, which --retarget needs")
            metas = metas_from_keypoints(self.pose(canvas[None], box), _hw(canvas), profile=self.profile)
        return Character(picture_rgb=canvas, metas=metas)

    def process(self, path: Path, *, skip: frozenset[str] = frozenset()) -> Iterator[dict[str, Any]]:
        """Yield the rows of one video.

        Args:
            path: the video.
            skip: clip ids that exist already.

        Raises:
            Rejected: the video gives no clips.
            UserVideoError: it cannot be decoded.
        """
        info = probe(path)
        track = self._measure(info)
        windows = self._windows(track)
        if not windows:
            raise Rejected(
                "too_short",
                f"{path}: no stretch of {self.settings.num_frames} frames at {self.settings.fps:g} fps with the person in "
                f"it (longest {track.longest}); use a smaller --num-frames",
            )
        for window in windows[: self.settings.max_clips]:
            name = clip_id(path.stem, info.sha256, float(track.seconds[window.start]), 0)
            if name not in skip:
                yield self._row(name, info, track, window)

    def _measure(self, info: VideoInfo) -> "Track":
        """Decode, resize, detect, follow and measure the whole video's main person."""
        indices = sample_indices_by_time(info.pts_seconds, target_fps=self.settings.fps)
        batch = decode_frames(info.path, indices)
        hw = canvas_hw((info.height, info.width), self.settings.area, SIZE_DIVISOR, profile=self.profile)
        frames = np.stack([cover_resize(f, height=hw[0], width=hw[1], interpolation=3) for f in batch.frames_rgb])
        boxes = follow_largest(self.detector.people(frames), hw)
        if not (boxes[:, 4] >= 0).any():
            raise Rejected("no_person", f"{info.path}: no person found in {len(frames)} frames")
        keypoints = self.pose(frames, boxes)
        return Track(frames_rgb=frames, seconds=batch.pts_seconds, boxes=boxes, keypoints=keypoints)

    def _windows(self, track: "Track") -> list[slice]:
        """Stretches of `num_frames` frames, end to end, in which the person is found in every frame."""
        size = self.settings.num_frames
        starts = range(0, len(track.frames_rgb) - size + 1, size)
        return [slice(s, s + size) for s in starts if (track.boxes[s : s + size, 4] >= 0).all()]

    def _row(self, name: str, info: VideoInfo, track: "Track", window: slice) -> dict[str, Any]:
        frames, boxes, keypoints = track.frames_rgb[window], track.boxes[window], track.keypoints[window]
        hw = _hw(frames[0])
        metas = metas_from_keypoints(keypoints, hw, profile=self.profile)
        mask = self.segmenter(frames, boxes)
        faces = face_boxes(metas, profile=self.profile)
        reference, reference_source = self._reference(track, window)
        pose, canvas = self._pose(metas, keypoints, hw)
        video, encoder = encode_mp4(frames, self.settings.fps)
        face_video = encode_mp4(crop_faces(frames, faces), self.settings.fps)[0] if faces is not None else None
        quality = clip_quality(frames, boxes_xyxys=boxes, keypoints=keypoints, face_boxes_xyxy=faces, mask=mask)
        described = self.described()
        provenance = {
            "tools": {tool: version(tool) for tool in _TOOLS}, "settings": described, "video_encoder": encoder,
            "source_fps": info.fps, "source_hw": [info.height, info.width],
        }  # fmt: skip
        seconds = track.seconds[window]
        is_train = self.settings.purpose == "train"
        return {
            "schema": CLIPS_SCHEMA,
            "clip_id": name,
            "source": {
                "path": str(info.path), "sha256": info.sha256, "start_seconds": float(seconds[0]),
                "end_seconds": float(seconds[-1]) + 1 / self.settings.fps, "track": 0,
            },
            "caption": self.settings.caption,
            "num_frames": len(frames),
            "height": hw[0],
            "width": hw[1],
            "fps": self.settings.fps,
            "timestamps": seconds.tolist(),
            "video": {"bytes": video, "path": None},
            "reference": {"bytes": _png(reference), "path": None},
            "reference_source": reference_source,
            "purpose": self.settings.purpose,
            "modes": ["animation", "replacement"] if is_train else ["animation"],
            "boxes": boxes.astype(np.float32),
            "keypoints": keypoints.astype(np.float32),
            "pose_keypoints": pose.astype(np.float32),
            "canvas_height": canvas[0],
            "canvas_width": canvas[1],
            "face_boxes": faces,
            "face_video": {"bytes": face_video, "path": None} if face_video is not None else None,
            "mask": pack_mask(mask),
            "quality": quality,
            "settings_hash": store.settings_hash(described),
            "provenance": json.dumps(provenance),
        }  # fmt: skip

    def _reference(self, track: "Track", window: slice) -> tuple[Frames, dict[str, Any]]:
        """The character's picture and where it is from."""
        if self.character is not None:
            return self.character.picture_rgb, {"kind": "image", "seconds": None}
        scores = np.where(track.boxes[:, 4] >= 0, track.keypoints[:, :17, 2].mean(axis=1), -1.0)
        if self.settings.reference == "first":
            index = int(np.flatnonzero(scores >= 0)[0])
        else:
            outside = scores.copy()
            outside[window] = -1.0
            index = int(outside.argmax() if outside.max() >= 0 else scores.argmax())
        return track.frames_rgb[index], {"kind": "frame", "seconds": float(track.seconds[index])}

    def _pose(self, metas: PoseMetas, keypoints: Float, hw: tuple[int, int]) -> tuple[Float, tuple[int, int]]:
        """The 62 points that are drawn, with the canvas they are drawn on."""
        if self.character is None:
            return pose62(keypoints, hw, profile=self.profile), hw
        canvas = _hw(self.character.picture_rgb)
        if self.character.metas is not None:
            frame = template_frame(metas, profile=self.profile)
            fit = fit_retargeting(metas[frame : frame + 1], self.character.metas, profile=self.profile)
            return hide_low_scores(retarget(metas, fit, profile=self.profile)), canvas
        # Without retargeting the driving picture is fitted onto the canvas, as the original pads its drawing.
        points = pose62(keypoints, hw, profile=self.profile).copy()
        scale = min(canvas[0] / hw[0], canvas[1] / hw[1])
        points[..., 0] = points[..., 0] * scale + (canvas[1] - hw[1] * scale) / 2
        points[..., 1] = points[..., 1] * scale + (canvas[0] - hw[0] * scale) / 2
        return points, canvas


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Character:
    """The picture that drives: (H, W, 3) on its canvas, and its pose if retargeting was asked for."""

    picture_rgb: Frames
    metas: PoseMetas | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Track:
    """One person through a video of T frames: frames (T, H, W, 3), boxes (T, 5), keypoints (T, 133, 3)."""

    frames_rgb: Frames
    seconds: Float
    boxes: Float
    keypoints: Float

    @property
    def longest(self) -> int:
        """The longest stretch of frames with the person."""
        best = current = 0
        for found in self.boxes[:, 4] >= 0:
            current = current + 1 if found else 0
            best = max(best, current)
        return best


def run(pipeline: Pipeline, videos: Sequence[Path], output: Path) -> dict[str, int]:
    """Process videos into a clips dataset; go on where an earlier run stopped.

    Returns:
        Counts of `clips` written now, `finished` and `rejected` videos in all.

    Raises:
        ValueError: the output belongs to another run, the disk is full, or no video gave a clip.
    """
    store.claim_output(output, schema=CLIPS_SCHEMA, settings=pipeline.described())
    finished, rejected = _journal(output / FINISHED_FILE), _journal(output / REJECTED_FILE)
    known = {entry["path"] for entry in (*finished, *rejected)}
    todo = [path for path in videos if str(path) not in known]
    done = frozenset(store.ids(output, "clip_id"))
    counts = {"clips": 0, "finished": len(finished), "rejected": len(rejected)}
    with store.PartWriter(output, writer="writer0", features=clips_features()) as writer:
        for path in tqdm(todo, "videos", unit="video", disable=None):
            try:
                for row in pipeline.process(path, skip=done):
                    writer.write(row)
                    counts["clips"] += 1
            except store.StoreError:
                raise
            except ValueError as error:
                reason = error.reason if isinstance(error, Rejected) else "unreadable"
                logger.warning("%s: %s", reason, error)
                _note(output / REJECTED_FILE, {"path": str(path), "reason": reason, "detail": str(error)})
                counts["rejected"] += 1
                continue
            writer.flush()  # the clips are safe before the video is called finished
            _note(output / FINISHED_FILE, {"path": str(path)})
            counts["finished"] += 1
    if not store.parts(output):
        reasons = "; ".join(entry["detail"] for entry in _journal(output / REJECTED_FILE)[:5])
        raise ValueError(f"no video gave a clip: {reasons}")
    return counts


def _journal(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal; a last line that a kill cut short does not count."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _note(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _hw(picture: Frames) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]


def _png(picture_rgb: Frames) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture_rgb).save(buffer, "PNG")
    return buffer.getvalue()


def _onnx_file(path: Path) -> Path:
    return path / "end2end.onnx" if path.is_dir() else path
