"""What is measured of a clip, its person and its figures, while its videos are encoded beside."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocessing.clip_row import Encoded, MeasuredPerson, Origin, person_columns, plain_row
from preprocessing.face import crop_faces, face_boxes
from preprocessing.pose import metas_from_keypoints
from preprocessing.quality import clip_quality
from preprocessing.shots import Stretch
from preprocessing.tracking import smooth_boxes
from preprocessing.types import Frames, Int, Person
from preprocessing.video import encode_mp4

if TYPE_CHECKING:
    from preprocessing.pipeline import Pipeline

Encoding = Future[Encoded]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredClip:
    """A clip that was measured, while its videos are being encoded: the columns of these names."""

    stretch: Stretch
    quality: dict[str, float | None]
    person: MeasuredPerson | None
    video: Encoding
    face_video: Encoding | None

    def row(self, origin: Origin, name: str, *, fps: float) -> dict[str, Any]:
        """All columns but those that need its whole track; waits for the videos."""
        stretch, person = self.stretch, {} if self.person is None else person_columns(self.person)
        videos: dict[str, Encoded | None] = {"video": self.video.result()}
        if self.person is not None:
            videos["face_video"] = self.face_video.result() if self.face_video else None
        row = plain_row(
            origin, name, seconds=stretch.seconds, fps=fps, hw=stretch.frames_rgb.shape[1:3],
            track=max(stretch.window.track, 0), videos=videos, quality=self.quality,
        )  # fmt: skip
        return {**row, **person}

    def drop(self) -> None:
        """Encode nothing that was not begun."""
        for encoding in (self.video, self.face_video):
            if encoding is not None:
                encoding.cancel()


def measure(stretch: Stretch, pipeline: "Pipeline") -> MeasuredClip:
    """Measure a clip; its video is encoded beside the pose network, that of the face beside the segmenter."""
    video = pipeline.beside(encode_mp4, stretch.frames_rgb, pipeline.settings.fps)
    person, face_video = (None, None) if stretch.boxes_xyxys is None else _measure_person(stretch, pipeline)
    quality = clip_quality(
        stretch.frames_rgb,
        boxes_xyxys=None if person is None else person.boxes,
        keypoints=None if person is None else person.keypoints,
        face_boxes_xyxy=None if person is None else person.face_boxes,
        mask=None if person is None else person.mask,
    )
    return MeasuredClip(stretch=stretch, quality=quality, person=person, video=video, face_video=face_video)


def _measure_person(stretch: Stretch, pipeline: "Pipeline") -> tuple[MeasuredPerson, Encoding | None]:
    networks, frames, boxes = pipeline.networks, stretch.frames_rgb, stretch.boxes_xyxys
    assert networks is not None and boxes is not None
    if networks.profile.boxes == "smoothed":
        boxes = smooth_boxes(boxes)
    measured = networks.pose(frames, boxes)
    metas = metas_from_keypoints(measured.keypoints, frames.shape[1:3], profile=networks.profile)
    faces = face_boxes(metas, profile=networks.profile)
    face_video = None if faces is None else pipeline.beside(_encode_faces, frames, faces, pipeline.settings.fps)
    others = [Person(boxes_xyxys=other, keypoints=None) for other in stretch.others_xyxys]
    mask = networks.segmenter(frames, Person(boxes_xyxys=boxes, keypoints=measured.keypoints), others)
    person = MeasuredPerson(
        boxes=boxes, keypoints=measured.keypoints, keypoints_3d=measured.keypoints_3d, face_boxes=faces, mask=mask
    )
    return person, face_video


def _encode_faces(frames_rgb: Frames, boxes_xyxy: Int, fps: float) -> Encoded:
    return encode_mp4(crop_faces(frames_rgb, boxes_xyxy), fps)
