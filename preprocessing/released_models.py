"""The networks that Wan2.2-Animate is released with: where they lie, whether they are what was downloaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = "Wan-AI/Wan2.2-Animate-14B"
RECORD_FILE = "models.json"
_ROOT = "process_checkpoint"


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """Where a network lies in the repository, and what a person who fetches it by hand has to know."""

    path: str
    hint: str = ""


RELEASED: dict[str, Released] = {
    "detector": Released(path=f"{_ROOT}/det/yolov10m.onnx"),
    # More than the 2 GB that one ONNX file can hold: end2end.onnx and its weights, in a folder called as a file.
    "pose": Released(
        path=f"{_ROOT}/pose2d/vitpose_h_wholebody.onnx", hint="a folder: end2end.onnx and all its weights, 2.5 GB"
    ),
    "segmenter": Released(path=f"{_ROOT}/sam2/sam2_hiera_large.pt"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file as it was when its hash agreed with the hub's. revision: the commit it is from."""

    bytes: int
    sha256: str
    revision: str


def find_models(folder: Path) -> dict[str, Path]:
    """Return the networks that lie in `folder` as the repository has them, with or without `process_checkpoint/`."""
    found: dict[str, Path] = {}
    for name, released in RELEASED.items():
        for place in (folder / released.path, folder / Path(released.path).relative_to(_ROOT)):
            if place.exists():
                found.setdefault(name, place)
    return found


def files_of(names: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Which of the repository's `paths` make up each network: its file, or all files of its folder."""
    return {
        name: sorted(p for p in paths if p == RELEASED[name].path or p.startswith(f"{RELEASED[name].path}/"))
        for name in names
    }


def read_record(folder: Path) -> dict[str, FileRecord]:
    """Read what was downloaded into `folder`: path -> record; empty where nothing was.

    Raises ValueError for a damaged file.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        return {name: FileRecord(**entry) for name, entry in json.loads(path.read_text())["files"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run `wan-preprocess download` again") from error


def write_record(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Replace the record of `folder` at once."""
    from wan_accel.data.store import write_json

    files = {name: asdict(record) for name, record in sorted(records.items())}
    write_json(folder / RECORD_FILE, {"repository": REPOSITORY, "files": files})


def check_files(folder: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """Compare files with their records; returns what is wrong, one line each."""
    from preprocessing.video import sha256_file

    problems = []
    for name, record in sorted(records.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{path}: {path.stat().st_size} bytes, {record.bytes} were downloaded")
        elif sha256_file(path) != record.sha256:
            problems.append(f"{path}: its content is not what was downloaded")
    return problems
