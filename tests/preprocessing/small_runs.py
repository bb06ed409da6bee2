"""Small runs over real videos with the demo's networks, for tests of the pipeline and of jobs."""

import io
import json
from pathlib import Path

import numpy as np

from preprocessing.description import describe
from preprocessing.detection import select_person
from preprocessing.inputs import Source
from preprocessing.job import JobOptions, Summary, run
from preprocessing.pipeline import Pipeline
from preprocessing.ray_job import run_on_ray
from preprocessing.settings import ModelFiles, Runtime, Settings
from preprocessing.thresholds import load_bounds
from preprocessing.video import decode_frames, encode_mp4
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA

DEMO = Path(__file__).parents[2] / "demo"
MODELS = ModelFiles(
    detector=DEMO / "models/person_detector.onnx",
    pose=DEMO / "models/wholebody133.onnx",
    segmenter=DEMO / "models/person_segmenter.onnx",
)
NETWORK_OPTIONS = [f"--{name}={getattr(MODELS, name)}" for name in ("detector", "pose", "segmenter")]
SMALL = {"num_frames": 5, "fps": 10.0, "area": 160 * 288}
SMALL_OPTIONS = ["--num-frames=5", "--fps=10", "--resolution-area=160*288"]


def settings(**changes) -> Settings:
    """Small clips, with the bounds that the command has by itself."""
    bounds = {} if changes.get("kind") == "clips" else load_bounds(None)
    return Settings(**{"quality": bounds, **SMALL, **changes})


def pipeline(**changes) -> Pipeline:
    chosen = settings(**changes)
    return Pipeline(chosen, MODELS if chosen.kind == "animate" else None, runtime=Runtime(num_threads=2))


def process(made: Pipeline, path: Path, **source):
    """All that a pipeline gives for a video."""
    return list(made.process(Source(**{**NOTHING_SAID, "path": str(path), **source}), path))


NOTHING_SAID = {"caption": None, "reference": None, "start_seconds": None, "end_seconds": None}


def run_job(paths, output: Path, **options) -> Summary:
    """Run worker processes; `workers` of them, `options` of the job, everything else are settings."""
    return run(*_job(paths, options)[0], output, **_job(paths, options)[1])


def run_on_ray_cluster(paths, output: Path, **options) -> Summary:
    """The same on a Ray cluster of this machine."""
    return run_on_ray(*_job(paths, options)[0], output, **_job(paths, options)[1], address="local")


def _job(paths, given: dict) -> tuple[tuple, dict]:
    changes = dict(given)
    workers, options = changes.pop("workers", 1), changes.pop("options", {})
    chosen = settings(**changes)
    models = MODELS if chosen.kind == "animate" else None
    sources = [Source(**{**NOTHING_SAID, "path": str(path)}) for path in paths]
    job = JobOptions(runtimes=[Runtime(num_threads=1)] * workers, **options)
    return (chosen, models, sources), {"described": describe(chosen, models), "options": job}


def main_people(detector, frames) -> np.ndarray:
    """The main person of each frame: (T, 5), score below 0 for nobody."""
    return np.stack([select_person(people, frames.shape[1:3]) for people in detector.people(frames)])


def write_video(path: Path, frames, *, fps: float = 30.0) -> Path:
    path.write_bytes(encode_mp4(frames, fps, preset="ultrafast")[0])
    return path


def part_of(name: str, path: Path, frames) -> Path:
    """Some frames of a demo video as a video."""
    return write_video(path, decode_frames(DEMO / "videos" / name, list(frames)).frames_rgb)


def rows_of(output: Path) -> dict[str, dict]:
    """Every row by its clip id, values comparable with ==."""
    rows = {}
    for row in store.load(output, CLIPS_SCHEMA):
        assert row["clip_id"] not in rows
        rows[row["clip_id"]] = {name: _comparable(value) for name, value in row.items()}
    return rows


def _comparable(value):
    if hasattr(value, "save"):  # a picture
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(value, float | list):
        return np.asarray(value, dtype=object).tolist() if _is_text(value) else np.asarray(value, float).tobytes()
    return value


def _is_text(value) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def rejections(output: Path) -> list[dict]:
    path = output / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def assert_same_rows(output: Path, expected: Path) -> None:
    """Say which columns of which clips differ."""
    found, wanted = rows_of(output), rows_of(expected)
    assert sorted(found) == sorted(wanted)
    columns = [(name, column) for name in wanted for column in wanted[name]]
    different = [f"{name}.{column}" for name, column in columns if found[name][column] != wanted[name][column]]
    assert different == [], different
