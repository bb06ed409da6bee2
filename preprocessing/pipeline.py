"""From videos to clips: the stages in their order, a video at a time; what fails becomes a reason, not a crash."""

import io
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.canvas import resize_by_area
from preprocessing.detection import PersonDetector
from preprocessing.face import crop_faces, face_boxes
from preprocessing.masks import OnnxPersonSegmenter
from preprocessing.pose import WholeBodyPose, hide_low_scores, metas_from_keypoints, pose62
from preprocessing.quality import clip_quality
from preprocessing.retarget import Retargeting, fit_retargeting, retarget
from preprocessing.settings import ModelFiles, Settings
from preprocessing.template import choose_template
from preprocessing.tracking import follow_largest, track_numbers
from preprocessing.types import PROFILES, Float, Frames, Int, PoseMetas
from preprocessing.video import VideoInfo, decode_frames, encode_mp4, probe, sample_indices_by_time, sha256_file
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA, clip_id, pack_mask

SIZE_DIVISOR = 16
_CHUNK_FRAMES = 64  # decoded at the source's size at a time, which may be 50 times that of the clips


class Rejected(ValueError):
    """A video that gives no clips. `reason` is one word for grouping, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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

    def process(self, path: Path, *, skip: Collection[str] = ()) -> Iterator[dict[str, Any]]:
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
        windows = self._windows(track.boxes)
        if not windows:
            raise Rejected(
                "too_short",
                f"{path}: no stretch of {self.settings.num_frames} frames at {self.settings.fps:g} fps with the "
                f"person in it (longest {track.longest}); use a smaller --num-frames",
            )
        fit = self._fit(track)
        for window in windows[: self.settings.max_clips]:
            number = int(track.numbers[window.start])
            name = clip_id(path.stem, info.sha256, float(track.seconds[window.start]), number)
            if name not in skip:
                yield self._row(name, info, track, window, fit)

    def _measure(self, info: VideoInfo) -> "Track":
        """Detect, follow and measure the video's main person, up to the end of the last clip that is wanted."""
        indices = sample_indices_by_time(info.pts_seconds, target_fps=self.settings.fps)
        chunks: list[Frames] = []
        people: list[Float] = []
        for start in range(0, len(indices), _CHUNK_FRAMES):
            chunks.append(self._resized(info, indices[start : start + _CHUNK_FRAMES]))
            people += self.detector.people(chunks[-1])
            boxes = follow_largest(people, _hw(chunks[0][0]))
            if self.settings.max_clips and len(self._windows(boxes)) >= self.settings.max_clips:
                break
        frames = np.concatenate(chunks)
        if not (boxes[:, 4] >= 0).any():
            raise Rejected("no_person", f"{info.path}: no person found in {len(frames)} frames")
        return Track(
            frames_rgb=frames,
            seconds=info.pts_seconds[indices[: len(frames)]],
            boxes=boxes,
            numbers=track_numbers(boxes),
            keypoints=self.pose(frames, boxes),
        )

    def _resized(self, info: VideoInfo, indices: Int) -> Frames:
        frames = decode_frames(info.path, indices).frames_rgb
        area = self.settings.area
        return np.stack([resize_by_area(frame, area, SIZE_DIVISOR, profile=self.profile) for frame in frames])

    def _windows(self, boxes: Float) -> list[slice]:
        """Stretches of `num_frames` frames, end to end, that show the person throughout (so: one person)."""
        size = self.settings.num_frames
        windows, start = [], 0
        while start + size <= len(boxes):
            missing = np.flatnonzero(boxes[start : start + size, 4] < 0)
            if len(missing) == 0:
                windows.append(slice(start, start + size))
                start += size
            else:
                start += int(missing[-1]) + 1
        return windows

    def _fit(self, track: "Track") -> Retargeting | None:
        """What carries the driving person over to the character: one for all clips, so that they belong together."""
        if self.character is None or self.character.metas is None:
            return None
        found = track.boxes[:, 4] >= 0
        metas = metas_from_keypoints(track.keypoints[found], track.hw, profile=self.profile)
        frame = choose_template(metas, profile=self.profile)
        return fit_retargeting(metas[frame : frame + 1], self.character.metas, profile=self.profile)

    def _row(
        self, name: str, info: VideoInfo, track: "Track", window: slice, fit: Retargeting | None
    ) -> dict[str, Any]:
        frames, boxes, keypoints = track.frames_rgb[window], track.boxes[window], track.keypoints[window]
        hw = track.hw
        metas = metas_from_keypoints(keypoints, hw, profile=self.profile)
        mask = self.segmenter(frames, boxes)
        faces = face_boxes(metas, profile=self.profile)
        reference, reference_source = self._reference(track, window)
        pose, canvas = self._pose(metas, keypoints, fit)
        video, encoder = encode_mp4(frames, self.settings.fps)
        face_video, face_encoder = None, None
        if faces is not None:
            face_video, face_encoder = encode_mp4(crop_faces(frames, faces), self.settings.fps)
        quality = clip_quality(frames, boxes_xyxys=boxes, keypoints=keypoints, face_boxes_xyxy=faces, mask=mask)
        described = self.described()
        provenance = {
            "tools": _tools(), "settings": described, "video_encoder": encoder, "face_video_encoder": face_encoder,
            "source_fps": info.fps, "source_hw": [info.height, info.width],
        }  # fmt: skip
        seconds = track.seconds[window]
        is_train = self.settings.purpose == "train"
        return {
            "schema": CLIPS_SCHEMA,
            "clip_id": name,
            "source": {
                "path": str(info.path), "sha256": info.sha256, "start_seconds": float(seconds[0]),
                "end_seconds": float(seconds[-1]) + 1 / self.settings.fps,
                "track": int(track.numbers[window.start]),
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
        same_person = (track.boxes[:, 4] >= 0) & (track.numbers == track.numbers[window.start])
        scores = np.where(same_person, track.keypoints[:, :17, 2].mean(axis=1), -1.0)
        if self.settings.reference == "first":
            index = int(np.flatnonzero(scores >= 0)[0])
        else:
            outside = scores.copy()
            outside[window] = -1.0
            index = int(outside.argmax() if outside.max() >= 0 else scores.argmax())
        return track.frames_rgb[index], {"kind": "frame", "seconds": float(track.seconds[index])}

    def _pose(
        self, metas: PoseMetas, keypoints: Float, fit: Retargeting | None
    ) -> tuple[Float, tuple[int, int]]:
        """The 62 points that are drawn, with the canvas they are drawn on."""
        hw = metas.height, metas.width
        if self.character is None:
            return pose62(keypoints, hw, profile=self.profile), hw
        canvas = _hw(self.character.picture_rgb)
        if fit is not None:
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
    """People through T frames of a video: frames (T, H, W, 3), boxes (T, 5), keypoints (T, 133, 3).

    numbers: (T,) which person a frame shows (see `track_numbers`). seconds: (T,) times in the source.
    """

    frames_rgb: Frames
    seconds: Float
    boxes: Float
    numbers: Int
    keypoints: Float

    @property
    def hw(self) -> tuple[int, int]:
        return _hw(self.frames_rgb[0])

    @property
    def longest(self) -> int:
        """The longest stretch of frames with a person."""
        best = current = 0
        for found in self.boxes[:, 4] >= 0:
            current = current + 1 if found else 0
            best = max(best, current)
        return best


def _tools() -> dict[str, str]:
    """Versions of what the clips depend on, whichever distribution a module comes from."""
    import av
    import cv2
    import decord
    import onnxruntime

    return {module.__name__: module.__version__ for module in (av, cv2, decord, np, onnxruntime)}


def _hw(picture: Frames) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]


def _png(picture_rgb: Frames) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture_rgb).save(buffer, "PNG")
    return buffer.getvalue()


def _onnx_file(path: Path) -> Path:
    return path / "end2end.onnx" if path.is_dir() else path
