"""One video on its way through the stages, streaming: shots, people, windows, measures, rows."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.clip_measures import MeasuredClip, measure
from preprocessing.clip_row import Origin
from preprocessing.description import tools
from preprocessing.detection import MIN_SCORE
from preprocessing.inputs import Source, caption_of
from preprocessing.moments import Moment, frame_hw, look
from preprocessing.rejection import Rejected, RejectedClip
from preprocessing.shots import Shot, Stretch
from preprocessing.thresholds import violation
from preprocessing.tracking import PeopleTracker, PersonPerFrame
from preprocessing.unfinished_tracks import UnfinishedTracks
from preprocessing.video import VideoInfo
from wan_accel.data.schema import clip_id

if TYPE_CHECKING:
    from preprocessing.pipeline import Pipeline

_SIGHTINGS_PER_SECOND = 2

Item = dict[str, Any] | RejectedClip


class VideoPass:
    """One video on its way through the pipeline."""

    def __init__(self, pipeline: "Pipeline", source: Source, info: VideoInfo) -> None:
        self.pipeline, self.settings, self.profile = pipeline, pipeline.settings, pipeline.profile
        self.source, self.info = source, info
        self.indices = pipeline.sample(source, info)
        caption = caption_of(source)
        self.origin = Origin(
            path=source.path,
            info=info,
            caption=self.settings.caption if caption is None else caption,
            described=pipeline.described,
            tools=tools(),
        )
        self.hw = frame_hw(info, self.settings, self.profile)
        self.tracks = UnfinishedTracks(pipeline, source, self.hw)
        self.encoding: deque[MeasuredClip] = deque()
        self.num_clips = self.num_bad = self.longest_run = 0
        self.saw_people = False

    def clips(self) -> Iterator[Item]:
        """Yield rows and rejected clips; raises Rejected where there are neither."""
        networks = self.pipeline.networks
        detector = None if networks is None else networks.detector
        shot = self._new_shot(0, 0)
        with closing(look(self.info, self.indices, self.settings, self.profile, detector)) as moments:
            for some in moments:
                shot = yield from self._follow(shot, some)
                yield from self._advance(shot)
                if self._is_enough():
                    break
        yield from self._advance(shot, ended=True)
        if self.num_clips + self.num_bad == 0:
            raise self._nothing_found()

    def _follow(self, shot: Shot, moments: list[Moment]) -> Generator[Item, None, Shot]:
        """Add moments to the shot; returns the one that goes on."""
        for moment in moments:
            if moment.starts_shot:
                yield from self._advance(shot, ended=True)
                shot = self._new_shot(shot.end, shot.next_number)
            self.saw_people = self.saw_people or (moment.people is not None and len(moment.people) > 0)
            shot.add(moment.frame_rgb, moment.seconds, moment.people)
        return shot

    def _is_enough(self) -> bool:
        return self.settings.max_clips is not None and self.num_clips >= self.settings.max_clips

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

    def _advance(self, shot: Shot, *, ended: bool = False) -> Iterator[Item]:
        """Work on what a shot has ready; finish the tracks that are over."""
        for stretch in shot.stretches(ended=ended):
            if not self._is_enough():
                yield from self._clip(stretch)
        self.tracks.consider(shot.forget(ended=ended or self._is_enough()))
        self.longest_run = max(self.longest_run, shot.longest_run)
        over = [number for number in self.tracks.numbers if ended or self._is_enough() or shot.is_over(number)]
        if over or ended:
            yield from self._encoded(leave=0)
        for number in over:
            yield from self.tracks.finish(number)

    def _clip(self, stretch: Stretch) -> Iterator[Item]:
        """Measure one clip and have it encoded meanwhile; give a reason against it, or earlier clips that are ready."""
        clip = measure(stretch, self.pipeline)
        self.tracks.offer(clip)
        bad = violation(clip.quality, self.settings.quality)
        if bad is None:
            self.num_clips += 1
            self.encoding.append(clip)
            yield from self._encoded(leave=1)
        else:
            clip.drop()
            self.num_bad += 1
            name = self._name(stretch)
            yield RejectedClip(clip_id=name, reason=f"quality.{bad[0]}", detail=bad[1], quality=clip.quality)

    def _encoded(self, *, leave: int) -> Iterator[dict[str, Any]]:
        """Give the rows of clips whose encoding is over, or put them away until their track ends."""
        while len(self.encoding) > leave:
            clip = self.encoding.popleft()
            row = clip.row(self.origin, self._name(clip.stretch), fps=self.settings.fps)
            if clip.person is None:
                yield row
            else:
                self.tracks.add(clip.stretch.window, row)

    def _name(self, stretch: Stretch) -> str:
        stem, track = Path(self.source.path).stem, max(stretch.window.track, 0)
        return clip_id(stem, self.info.sha256, float(stretch.seconds[0]), track)

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
