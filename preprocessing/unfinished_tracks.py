"""Tracks that still go on: their clips, and what those get when all of the track was seen."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.characters import driven_pose, reference_on_canvas
from preprocessing.clip_measures import MeasuredClip
from preprocessing.clip_row import reference_columns
from preprocessing.drafts import TrackDrafts
from preprocessing.inputs import Source
from preprocessing.pose import pose62
from preprocessing.retarget import Retargeting
from preprocessing.shots import Sighting
from preprocessing.windows import Window

if TYPE_CHECKING:
    from preprocessing.pipeline import Pipeline


class UnfinishedTracks:
    """The tracks of one video: candidates for their references, and rows that wait for the best of them."""

    def __init__(self, pipeline: "Pipeline", source: Source, hw: tuple[int, int]) -> None:
        self._settings, self._profile, self._networks = pipeline.settings, pipeline.profile, pipeline.networks
        self._source, self._hw = source, hw
        self._characters, self._character = pipeline.characters, pipeline.characters.of(source)
        self._drafts: dict[int, TrackDrafts] = {}
        self._sightings: list[Sighting] = []

    @property
    def numbers(self) -> list[int]:
        """Numbers of the tracks that something is known of."""
        return sorted(self._drafts)

    def offer(self, clip: MeasuredClip) -> None:
        """Consider a clip's frames as references, whether or not the clip is good enough itself."""
        if clip.person is None:
            return
        stretch = clip.stretch
        self._of(stretch.window.track).references.offer(
            frames=range(stretch.window.start, stretch.window.start + len(stretch.frames_rgb)),
            seconds=stretch.seconds,
            frames_rgb=stretch.frames_rgb,
            keypoints=clip.person.keypoints,
        )

    def consider(self, sightings: Sequence[Sighting]) -> None:
        """Take note of frames that no clip holds, to be measured: one of them may be a track's best reference."""
        if self._networks is None or self._settings.purpose != "train":
            return
        self._sightings += sightings
        if len(self._sightings) >= self._networks.pose.batch_frames:
            self._measure_sightings()

    def _measure_sightings(self) -> None:
        if not self._sightings or self._networks is None:
            return
        frames = [sighting.frame_rgb for sighting in self._sightings]
        boxes = np.stack([sighting.box_xyxys for sighting in self._sightings])
        keypoints = self._networks.pose(frames, boxes).keypoints
        for sighting, measured in zip(self._sightings, keypoints, strict=True):
            self._of(sighting.track).references.offer(
                frames=range(sighting.frame, sighting.frame + 1),
                seconds=np.array([sighting.seconds]),
                frames_rgb=sighting.frame_rgb[None],
                keypoints=measured[None],
            )
        self._sightings = []

    def add(self, window: Window, row: dict[str, Any]) -> None:
        """Keep a clip's row until its track ends."""
        drafts = self._of(window.track)
        drafts.add(window, row)
        if self._character is not None and self._character.metas is not None:
            drafts.keypoints.append(row["keypoints"])

    def finish(self, number: int) -> Iterator[dict[str, Any]]:
        """Give a track's rows their reference and pose, now that all of it was seen."""
        self._measure_sightings()
        drafts = self._drafts.pop(number)
        fit = self._fit(drafts)
        for window, row in drafts.take():
            yield {**row, **self._reference(drafts, window, row, fit)}

    def _of(self, number: int) -> TrackDrafts:
        return self._drafts.setdefault(number, TrackDrafts(self._settings.num_frames))

    def _fit(self, drafts: TrackDrafts) -> Retargeting | None:
        """What carries the driving person over to the character: one for a whole track."""
        if not drafts.keypoints or self._character is None:
            return None
        keypoints, best = np.concatenate(drafts.keypoints), drafts.references.best_for(range(0))
        return self._characters.fit(self._source, self._character, keypoints, self._hw, best.picture_rgb)

    def _reference(
        self, drafts: TrackDrafts, window: Window, row: dict[str, Any], fit: Retargeting | None
    ) -> dict[str, Any]:
        hw, keypoints = self._hw, row["keypoints"]
        purpose, kind, seconds = self._settings.purpose, "image", None
        if self._character is not None:
            pose = driven_pose(keypoints, hw, self._character, fit, profile=self._profile)
            picture, canvas = self._character.picture_rgb, self._character.hw
        elif self._settings.reference == "column":
            picture, canvas = reference_on_canvas(str(self._source.reference), hw), hw
            pose = pose62(keypoints, hw, profile=self._profile)
        else:
            best = drafts.references.best_for(range(window.start, window.start + row["num_frames"]))
            if self._settings.reference == "first" and drafts.references.first is not None:
                best = drafts.references.first
            picture, canvas, kind, seconds = best.picture_rgb, hw, "frame", best.seconds
            pose = pose62(keypoints, hw, profile=self._profile)
        columns = reference_columns(picture, kind=kind, seconds=seconds, pose=pose, canvas_hw=canvas, purpose=purpose)
        if fit is not None:
            columns["provenance"] = json.dumps({**json.loads(row["provenance"]), "retargeting": fit.described()})
        return columns
