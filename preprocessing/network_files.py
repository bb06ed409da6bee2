"""The files of a network: what it takes, known without opening it, its content's hash, what is derived from it."""

import hashlib
import os
from pathlib import Path
from typing import Any

from preprocessing.video import sha256_file

CACHE_VARIABLE = "WAN_ACCEL_CACHE"


def cache_folder() -> Path:
    """Where converted networks and engines are kept: $WAN_ACCEL_CACHE, by default wan-accel in the user's cache.

    Never beside the network: that folder may be shared, read-only, or checked by its hash.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-accel"


def read_graph(onnx_path: Path) -> Any:
    """Parse a network without the weights that lie in other files (onnx.ModelProto).

    Raises ValueError for a file that is no network.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(onnx_path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{onnx_path}: not a complete ONNX model ({error})") from error


def first_input(model: Any) -> tuple[str, tuple[int | None, ...]]:
    """Name and shape of a network's picture; None for sizes that are free. Some files list weights as inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in weights)
    sizes = value.type.tensor_type.shape.dim
    return value.name, tuple(size.dim_value if size.HasField("dim_value") else None for size in sizes)


def content_hash(onnx_path: Path, model: Any) -> str:
    """sha256 of a network: of its file, or of its file's hash and those of the files with weights that it names."""
    hashes = [sha256_file(path) for path in (onnx_path, *_weight_files(onnx_path, model))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _weight_files(onnx_path: Path, model: Any) -> list[Path]:
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    paths = [onnx_path.parent / name for name in sorted({ExternalDataInfo(tensor).location for tensor in tensors})]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{onnx_path}: its weights are in other files, of which {', '.join(missing[:3])} is missing")
    return paths
