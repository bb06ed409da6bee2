"""One video on its way through the stages, streaming: shots, people, windows, measures, rows."""

import importlib
import importlib.metadata
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.ahead import ahead
from preprocessing.canvas import canvas_hw, resize_by_area
from preprocessing.characters import driven_pose, reference_on_canvas
from preprocessing.clip_row import Encoded, MeasuredPerson, Origin, person_columns, plain_row, reference_columns
from preprocessing.detection import MIN_SCORE
from preprocessing.drafts import TrackDrafts
from preprocessing.face import crop_faces, face_boxes
from preprocessing.inputs import Source, caption_of
from preprocessing.pose import metas_from_keypoints, pose62
from preprocessing.quality import clip_quality
from preprocessing.rejection import Rejected, RejectedClip
from preprocessing.retarget import Retargeting
from preprocessing.scenes import ShotDetector
from preprocessing.shots import Shot, Sighting, Stretch
from preprocessing.thresholds import violation
from preprocessing.tracking import PeopleTracker, PersonPerFrame, smooth_boxes
from preprocessing.types import Float, FrameBatch, Frames, Person
from preprocessing.video import VideoInfo, stream_frames
from preprocessing.windows import Window
from wan_accel.data.schema import clip_id

if TYPE_CHECKING:
    from preprocessing.pipeline import Pipeline

_CHUNK_FRAMES = 32  # decoded at the source's size at a time, which may be 50 times that of the clips
_SIGHTINGS_PER_SECOND = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Encoding:
    """A clip that was measured, while its videos are being encoded."""

    name: str
    window: Window
    seconds: Float
    video: "Future[Encoded]"
    person: MeasuredPerson | None
    quality: dict[str, float | None]


class VideoPass:
    """One video on its way through the pipeline."""

    def __init__(self, pipeline: "Pipeline", source: Source, info: VideoInfo) -> None:
        self.pipeline, self.settings, self.profile = pipeline, pipeline.settings, pipeline.profile
        self.source, self.info = source, info
        self.indices = pipeline.sample(source, info)
        self.character = pipeline.characters.of(source)
        caption = caption_of(source)
        self.origin = Origin(
            path=source.path,
            info=info,
            caption=self.settings.caption if caption is None else caption,
            described=pipeline.described,
            tools=_tools(),
        )
        self.hw = canvas_hw(
            (info.height, info.width), self.settings.area, self.settings.divisor, profile=self.profile
        )
        self.drafts: dict[int, TrackDrafts] = {}
        self.encoding: deque[_Encoding] = deque()
        self.num_clips = self.num_bad = self.longest_run = 0
        self.saw_people = False
        self.shots = ShotDetector(self.settings.fps)

    def clips(self) -> Iterator[dict[str, Any] | RejectedClip]:
        """Yield rows and rejected clips; raises Rejected where there are neither."""
        pending: list[tuple[Frames, float, Float | None]] = []
        shot, index = self._new_shot(0, 0), 0
        for chunk in ahead(self._chunks()):
            pending += self._look(chunk)
            settled = self.shots.num_settled if self.profile.shots == "split" else index + len(pending)
            while pending and index < settled:
                shot, ended = (self._new_shot(index, shot.next_number), shot) if self._cuts(index) else (shot, None)
                if ended is not None:
                    yield from self._advance(ended, ended=True)
                shot.add(*pending.pop(0))
                index += 1
            yield from self._advance(shot)
            if self._is_enough():
                break
        for moment in pending if not self._is_enough() else []:
            shot, ended = (self._new_shot(index, shot.next_number), shot) if self._cuts(index) else (shot, None)
            if ended is not None:
                yield from self._advance(ended, ended=True)
            shot.add(*moment)
            index += 1
        yield from self._advance(shot, ended=True)
        if self.num_clips + self.num_bad == 0:
            raise self._nothing_found()

    def _cuts(self, index: int) -> bool:
        return index > 0 and self.profile.shots == "split" and index in self.shots.cuts

    def _is_enough(self) -> bool:
        return self.settings.max_clips is not None and self.num_clips >= self.settings.max_clips

    def _chunks(self) -> Iterator[FrameBatch]:
        settings = self.settings
        for batch in stream_frames(self.info.path, self.indices, chunk_frames=_CHUNK_FRAMES):
            frames = [
                resize_by_area(frame, settings.area, settings.divisor, profile=self.profile)
                for frame in batch.frames_rgb
            ]
            yield FrameBatch(frames_rgb=np.stack(frames), pts_seconds=batch.pts_seconds)

    def _look(self, chunk: FrameBatch) -> list[tuple[Frames, float, Float | None]]:
        """Detect people and cuts in the next frames."""
        if self.profile.shots == "split":
            self.shots.push(chunk.frames_rgb)
        networks = self.pipeline.networks
        people: list[Float | None] = [None] * len(chunk)
        if networks is not None:
            people = list(networks.detector.people(chunk.frames_rgb))
            self.saw_people = self.saw_people or any(p is not None and len(p) > 0 for p in people)
        return list(zip(chunk.frames_rgb, chunk.pts_seconds.tolist(), people, strict=True))

    def _new_shot(self, first_frame: int, first_number: int) -> Shot:
        settings = self.settings
        tracker: PeopleTracker | PersonPerFrame | None = None
        if settings.kind == "animate" and self.profile.people == "tracked":
            tracker = PeopleTracker(settings.fps, min_score=MIN_SCORE, first_number=first_number)
        elif settings.kind == "animate":
            tracker = PersonPerFrame(self.hw, number=first_number)
        return Shot(
            first_frame=first_frame,
            num_frames=settings.num_frames,
            stride=settings.step_frames,
            people=settings.people if tracker is not None else "none",
            tracker=tracker,
            sighting_every=max(1, round(settings.fps / _SIGHTINGS_PER_SECOND)),
        )

    def _advance(self, shot: Shot, *, ended: bool = False) -> Iterator[dict[str, Any] | RejectedClip]:
        """Work on what a shot has ready; finish the tracks that are over."""
        for stretch in shot.stretches(ended=ended):
            if not self._is_enough():
                yield from self._clip(stretch)
        self._consider(shot.forget(ended=ended or self._is_enough()))
        self.longest_run = max(self.longest_run, shot.longest_run)
        over = [t for t in sorted(self.drafts) if ended or self._is_enough() or shot.is_over(t)]
        if over or ended:
            yield from self._encoded(leave=0)
        for track in over:
            yield from self._finish(track)

    def _clip(self, stretch: Stretch) -> Iterator[dict[str, Any] | RejectedClip]:
        """Measure one clip and have it encoded meanwhile; give a reason against it, or earlier clips that are ready."""
        settings, window = self.settings, stretch.window
        name = clip_id(
            Path(self.source.path).stem, self.info.sha256, float(stretch.seconds[0]), max(window.track, 0)
        )
        video = self.pipeline.encode(stretch.frames_rgb)
        person = self._measure(stretch) if stretch.boxes_xyxys is not None else None
        quality = clip_quality(
            stretch.frames_rgb,
            boxes_xyxys=None if person is None else person.boxes,
            keypoints=None if person is None else person.keypoints,
            face_boxes_xyxy=None if person is None else person.face_boxes,
            mask=None if person is None else person.mask,
        )
        if (bad := violation(quality, settings.quality)) is not None:
            self.num_bad += 1
            yield RejectedClip(clip_id=name, reason=f"quality.{bad[0]}", detail=bad[1], quality=quality)
            return
        self.num_clips += 1
        if person is not None and person.face_boxes is not None:
            faces = self.pipeline.encode(crop_faces(stretch.frames_rgb, person.face_boxes))
            person = replace(person, face_video=faces)
        self.encoding.append(
            _Encoding(name=name, window=window, seconds=stretch.seconds, video=video, person=person, quality=quality)
        )
        yield from self._encoded(leave=1)

    def _encoded(self, *, leave: int) -> Iterator[dict[str, Any]]:
        """Give the rows of clips whose encoding is over, or put them away until their track ends."""
        while len(self.encoding) > leave:
            clip = self.encoding.popleft()
            row = plain_row(
                self.origin, clip.name, seconds=clip.seconds, fps=self.settings.fps, hw=self.hw,
                track=max(clip.window.track, 0), video=clip.video.result(), quality=clip.quality,
            )  # fmt: skip
            if clip.person is None:
                yield row
                continue
            drafts = self._drafts(clip.window.track)
            drafts.add(clip.window, {**row, **person_columns(clip.person, row)})
            if self.character is not None and self.character.metas is not None:
                drafts.keypoints.append(clip.person.keypoints)

    def _drafts(self, track: int) -> TrackDrafts:
        return self.drafts.setdefault(track, TrackDrafts(self.settings.num_frames))

    def _measure(self, stretch: Stretch) -> MeasuredPerson:
        """Pose, mask and face of a stretch's person, whose frames also become candidates for the reference."""
        networks, frames = self.pipeline.networks, stretch.frames_rgb
        assert networks is not None and stretch.boxes_xyxys is not None
        boxes = stretch.boxes_xyxys
        if self.profile.boxes == "smoothed":
            boxes = smooth_boxes(boxes)
        measured = networks.pose(frames, boxes)
        keypoints = measured.keypoints
        metas = metas_from_keypoints(keypoints, self.hw, profile=self.profile)
        others = [Person(boxes_xyxys=other, keypoints=None) for other in stretch.others_xyxys]
        mask = networks.segmenter(frames, Person(boxes_xyxys=boxes, keypoints=keypoints), others)
        window = stretch.window
        self._drafts(window.track).references.offer(
            frames=range(window.start, window.start + len(frames)),
            seconds=stretch.seconds,
            frames_rgb=frames,
            keypoints=keypoints,
        )
        return MeasuredPerson(
            boxes=boxes,
            keypoints=keypoints,
            keypoints_3d=measured.keypoints_3d,
            face_boxes=face_boxes(metas, profile=self.profile),
            face_video=None,
            mask=mask,
        )

    def _consider(self, sightings: list[Sighting]) -> None:
        """Measure frames that no clip holds: one of them may be a track's best reference."""
        networks = self.pipeline.networks
        if not sightings or networks is None or self.settings.purpose != "train":
            return
        frames = np.stack([sighting.frame_rgb for sighting in sightings])
        keypoints = networks.pose(frames, np.stack([sighting.box_xyxys for sighting in sightings])).keypoints
        for i, sighting in enumerate(sightings):
            self._drafts(sighting.track).references.offer(
                frames=range(sighting.frame, sighting.frame + 1),
                seconds=np.array([sighting.seconds]),
                frames_rgb=frames[i : i + 1],
                keypoints=keypoints[i : i + 1],
            )

    def _finish(self, track: int) -> Iterator[dict[str, Any]]:
        """Give a track's rows their reference and pose, now that all of it was seen."""
        drafts = self.drafts.pop(track)
        fit = self._fit(drafts)
        for window, row in drafts.take():
            yield {**row, **self._reference(drafts, window, row, fit)}

    def _fit(self, drafts: TrackDrafts) -> Retargeting | None:
        """What carries the driving person over to the character: one for a whole track."""
        if not drafts.keypoints or self.character is None:
            return None
        best = drafts.references.best_for(range(0))
        return self.pipeline.characters.fit(
            self.source, self.character, np.concatenate(drafts.keypoints), self.hw, best.picture_rgb
        )

    def _reference(
        self, drafts: TrackDrafts, window: Window, row: dict[str, Any], fit: Retargeting | None
    ) -> dict[str, Any]:
        hw, keypoints = self.hw, row["keypoints"]
        purpose, kind, seconds = self.settings.purpose, "image", None
        if self.character is not None:
            pose = driven_pose(keypoints, hw, self.character, fit, profile=self.profile)
            picture, canvas = self.character.picture_rgb, self.character.hw
        elif self.settings.reference == "column":
            picture, canvas = reference_on_canvas(str(self.source.reference), hw), hw
            pose = pose62(keypoints, hw, profile=self.profile)
        else:
            best = drafts.references.best_for(range(window.start, window.start + row["num_frames"]))
            if self.settings.reference == "first" and drafts.references.first is not None:
                best = drafts.references.first
            picture, canvas, kind, seconds = best.picture_rgb, hw, "frame", best.seconds
            pose = pose62(keypoints, hw, profile=self.profile)
        columns = reference_columns(picture, kind=kind, seconds=seconds, pose=pose, canvas_hw=canvas, purpose=purpose)
        if fit is not None:
            columns["provenance"] = json.dumps({**json.loads(row["provenance"]), "retargeting": fit.described()})
        return columns

    def _nothing_found(self) -> Rejected:
        path, settings = self.source.path, self.settings
        if settings.kind == "animate" and not self.saw_people:
            return Rejected("no_person", f"{path}: no person found in {len(self.indices)} frames")
        what = "with one person in it" if settings.kind == "animate" else "without a cut"
        longest = f" (longest {self.longest_run})" if settings.kind == "animate" else ""
        return Rejected(
            "too_short",
            f"{path}: no stretch of {settings.num_frames} frames at {settings.fps:g} fps {what}{longest}; use a "
            "smaller --num-frames",
        )


def _tools() -> dict[str, str]:
    """Versions of what clips depend on, whichever distribution a module comes from."""
    modules = ("av", "cv2", "numpy", "onnxruntime", "scenedetect", "scipy")
    versions = {name: str(importlib.import_module(name).__version__) for name in modules}
    return {**versions, "trackers": importlib.metadata.version("trackers")}
