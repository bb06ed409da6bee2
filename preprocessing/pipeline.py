"""The networks and settings of a run, through which videos pass."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from preprocessing.characters import Characters
from preprocessing.description import describe
from preprocessing.editing import StandardPoses
from preprocessing.inputs import Source
from preprocessing.people import PeopleNetworks
from preprocessing.rejection import Rejected, RejectedClip
from preprocessing.settings import ModelFiles, Runtime, Settings
from preprocessing.types import Int
from preprocessing.video import VideoInfo, probe, sample_indices, sample_indices_by_time
from preprocessing.video_pass import VideoPass

__all__ = ["Pipeline", "Rejected", "RejectedClip"]
_MOST_SECONDS_A_FRAME = 60.0
_Result = TypeVar("_Result")


class Pipeline:
    """The networks and settings of a run.

    Raises ValueError for a model file that is missing or of another kind, or a reference that is no picture.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelFiles | None = None,
        *,
        runtime: Runtime = Runtime(),  # noqa: B008
        described: dict[str, Any] | None = None,
    ) -> None:
        """`described`: what `describe` says of these arguments, where the caller knows it already."""
        self.settings = settings
        self.profile = settings.behaviour
        self.networks = PeopleNetworks(settings, models, runtime) if settings.kind == "animate" else None
        self._beside = ThreadPoolExecutor(2, thread_name_prefix="beside")
        self.described = describe(settings, models) if described is None else described
        self.characters = _characters(settings, self.networks, runtime)

    def process(
        self,
        source: Source,
        path: Path,
        *,
        skip: Collection[str] = (),
        first_with: Callable[[str], str] | None = None,
    ) -> Iterator[dict[str, Any] | RejectedClip]:
        """Yield the rows of one video, and the clips that were not good enough.

        Args:
            source: what is asked for; its caption, interval and reference count.
            path: where the video lies on this machine.
            skip: clip ids that exist already.
            first_with: gives the key of the first video with some content, to leave copies of it alone.

        Raises:
            Rejected: the video gives no clips.
            UserVideoError: it cannot be decoded.
        """
        info = probe(path)
        content = f"{info.sha256} {source.start_seconds} {source.end_seconds}"
        if first_with is not None and (first := first_with(content)) != source.key:
            raise Rejected("duplicate", f"{source.path}: the same file as {first}")
        run = VideoPass(self, source, info)
        for item in run.clips():
            if not (isinstance(item, dict) and item["clip_id"] in skip):
                yield item

    def beside(self, function: Callable[..., _Result], *arguments: Any) -> "Future[_Result]":
        """Start work that needs no network beside whatever comes next."""
        return self._beside.submit(function, *arguments)

    def sample(self, source: Source, info: VideoInfo) -> Int:
        """Choose the frames of a video that are looked at."""
        pts, fps = info.pts_seconds, self.settings.fps
        self._check_times(source, info)
        if self.profile.frame_sampling == "average_fps":
            indices = sample_indices(
                info.num_frames, video_fps=info.fps, target_fps=fps, duration_seconds=info.duration_seconds
            )
            inside = np.ones(len(indices), bool)
        else:
            indices = sample_indices_by_time(pts, target_fps=fps, start_seconds=source.start_seconds)
            inside = pts[indices] >= (source.start_seconds or 0.0)
        if source.end_seconds is not None:
            inside &= pts[indices] < source.end_seconds
        if not inside.any():
            raise Rejected(
                "empty_interval",
                f"{source.path}: no frame between {source.start_seconds} and {source.end_seconds} s, it lasts "
                f"{info.duration_seconds:.2f} s",
            )
        return indices[inside]

    def _check_times(self, source: Source, info: VideoInfo) -> None:
        """Turn down a video that stands still for long: one wrong time in it makes thousands of clips of one frame."""
        ends = np.append(info.pts_seconds[1:], info.duration_seconds)
        start, end = source.start_seconds or 0.0, source.end_seconds
        lasts = np.minimum(ends, np.inf if end is None else end) - np.maximum(info.pts_seconds, start)
        longest = int(lasts.argmax())
        if lasts[longest] > _MOST_SECONDS_A_FRAME:
            raise Rejected(
                "frozen",
                f"{source.path}: frame {longest} of {info.num_frames} is shown for {lasts[longest]:.0f} s, from "
                f"{info.pts_seconds[longest]:.2f} s on: its times are damaged, or nothing moves; give a manifest with "
                "start_seconds and end_seconds, or re-encode it",
            )


def _characters(settings: Settings, networks: PeopleNetworks | None, runtime: Runtime) -> Characters:
    """The characters, with what their retargeting needs."""
    if networks is None or settings.retarget == "none":
        return Characters(settings, measure=None, poses=None)
    poses = None
    if settings.retarget == "two_step":
        editor = None
        if settings.flux is not None:
            from preprocessing.flux import FluxKontextEditor

            editor = FluxKontextEditor(Path(settings.flux), device=runtime.torch_device, seed=settings.flux_seed)
        poses = StandardPoses(
            networks.measure_picture, editor=editor, folder=runtime.edits, profile=settings.behaviour
        )
    return Characters(settings, measure=networks.measure_picture, poses=poses)
