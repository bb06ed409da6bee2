"""`wan-preprocess animate` in this process, with its stages and networks counted."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stage_times import Stopwatch

from preprocessing import (
    box_segmenter,
    clip_measures,
    clip_row,
    moments,
    networks,
    pose,
    references,
    scenes,
    shots,
    tracking,
    unfinished_tracks,
    video,
)
from preprocessing.inputs import Source
from preprocessing.leases import Leases
from preprocessing.pipeline import Pipeline
from preprocessing.settings import ModelFiles, Runtime, Settings
from preprocessing.worker import Worker
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA

# Where the library looks each function up -> the stage that it belongs to.
STAGES: list[tuple[Any, str, str]] = [
    (video, "sha256_file", "hash"),
    (video, "read_contents", "probe"),
    (video, "read_frames", "decode (PyAV)"),
    (moments, "resize_by_area", "resize"),
    (scenes.ShotDetector, "push", "shots"),
    (networks, "detector_input", "detector: input"),
    (networks, "decode_people", "detector: boxes, NMS"),
    (tracking.PeopleTracker, "update", "tracking"),
    (shots.Shot, "stretches", "windows"),
    (clip_measures, "smooth_boxes", "tracking"),
    (networks, "pose_input", "pose: crop and input"),
    (networks, "crops_of_boxes", "pose: crop and input"),
    (networks, "decode_heatmaps", "pose: heat maps"),
    (clip_measures, "metas_from_keypoints", "key points to metas"),
    (pose, "metas_from_keypoints", "key points to metas"),
    (box_segmenter.BoxSegmenter, "_segment", "segmenter: input, mask"),
    (references.References, "offer", "references"),
    (unfinished_tracks, "reference_columns", "references"),
    (clip_measures, "face_boxes", "face boxes and crops"),
    (clip_measures, "crop_faces", "face boxes and crops"),
    (clip_measures, "clip_quality", "quality"),
    (clip_measures, "encode_mp4", "encode 2 mp4, check 42 dB"),
    (clip_row, "pack_mask", "pack masks"),
    (store.PartWriter, "write", "write rows"),
    (Worker, "commit", "commit"),
]


class OurWay:
    """A worker's pipeline, opened once; `__call__` turns videos into a dataset."""

    def __init__(
        self, models: ModelFiles, watch: Stopwatch, settings: Settings, *, provider: str, num_threads: int
    ) -> None:
        self.pipeline = Pipeline(settings, models, runtime=Runtime(provider=provider, num_threads=num_threads))
        assert self.pipeline.networks is not None
        opened = self.pipeline.networks
        for model in (opened.detector._model, opened.pose._model, opened.segmenter._model):  # type: ignore[attr-defined]
            model._session = watch.network(lambda session=model._session: session)
        self._watch = watch

    def __call__(self, videos: list[Path], folder: Path) -> None:
        """Everything from files to rows that count."""
        with ExitStack() as counted:
            for owner, attribute, stage in STAGES:
                counted.enter_context(self._watch.wrapped(owner, attribute, stage))
            self._work(videos, folder)

    def _work(self, videos: list[Path], folder: Path) -> None:
        output = Path(tempfile.mkdtemp(dir=folder))
        described = self.pipeline.described
        store.claim_output(output, schema=CLIPS_SCHEMA, settings=described)
        leases = Leases(output, "benchmark")
        worker = Worker(self.pipeline, output, name="benchmark-0", job=leases.job, scratch=folder)
        for source in map(_source, videos):
            leases.claim(source.key)
            outcome = worker.process(source)
            if not outcome.num_clips:
                raise RuntimeError(f"{source.path} gave no clip: {outcome.rejected}")
        worker.commit()
        leases.close()

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """The clips of one video."""
        return [row for row in self.pipeline.process(_source(path), path) if isinstance(row, dict)]


def _source(path: Path) -> Source:
    return Source(path=str(path), caption=None, reference=None, start_seconds=None, end_seconds=None)
