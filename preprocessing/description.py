"""Everything that the clips of a run depend on, in plain values: compared on resuming, stored as provenance."""

import hashlib
import importlib
import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocessing.flux import identity_of_flux
from preprocessing.network_files import content_hash, read_graph
from preprocessing.settings import ModelFiles, Settings
from preprocessing.video import sha256_file
from wan_accel.data.schema import CLIPS_SCHEMA


def describe(settings: Settings, models: ModelFiles | None = None) -> dict[str, Any]:
    """Settings, with files by their content: pictures and networks may move, but not change."""
    described: dict[str, Any] = {**settings.described(), "schema": CLIPS_SCHEMA}
    for name in ("reference", "edited_template", "edited_reference"):
        path = described[name]
        if path is not None and Path(path).is_file():
            described[name] = sha256_file(path)
    if settings.flux is not None:
        described["flux"] = identity_of_flux(Path(settings.flux))
    if models is not None:
        described["models"] = {name: hash_of_model(path) for name, path in asdict(models).items()}
    return described


def hash_of_model(path: Path) -> str:
    """sha256 of a network: of a file, with the weights beside it if it has any, or of a folder's names and files."""
    if path.is_file():
        return content_hash(path, read_graph(path)) if path.suffix == ".onnx" else sha256_file(path)
    listed = [(str(file.relative_to(path)), sha256_file(file)) for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def tools() -> dict[str, str]:
    """Versions of what clips depend on, whichever distribution a module comes from."""
    modules = ("av", "cv2", "numpy", "onnxruntime", "scenedetect", "scipy")
    versions = {name: str(importlib.import_module(name).__version__) for name in modules}
    return {**versions, "trackers": importlib.metadata.version("trackers")}
