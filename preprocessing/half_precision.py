"""Networks converted to half precision, once for each content."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from preprocessing.network_files import CACHE_VARIABLE, cache_folder, content_hash, read_graph


def half_precision(onnx_path: Path) -> Path:
    """Return a copy of a network that computes in float16; inputs and outputs keep their types.

    Made once, in the cache folder, under the hash of the network's content and the version of the converter, which is
    onnxruntime's own. Operators without a float16 kernel (TopK, NonMaxSuppression, ...) stay in float32.
    Raises ValueError where the network cannot be converted or the cache folder cannot be written.
    """
    import onnxruntime
    from filelock import FileLock

    model = read_graph(onnx_path)
    folder = cache_folder() / "fp16" / f"{content_hash(onnx_path, model)}-onnxruntime-{onnxruntime.__version__}"
    made = folder / onnx_path.name
    if made.is_file():
        return made
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # workers start at once: one converts, the others wait for it
            if not made.is_file():
                _save(_converted(onnx_path, model), made)
    except OSError as error:
        raise ValueError(
            f"{folder.parent}: the half-precision network cannot be written there ({error.strerror or error}); set "
            f"{CACHE_VARIABLE} to a folder with space"
        ) from error
    return made


def _converted(onnx_path: Path, model: Any) -> Any:
    from onnx.external_data_helper import load_external_data_for_model
    from onnx.shape_inference import infer_shapes
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        # Shapes first: with its weights inside, a network of 2 GiB is more than protobuf passes on.
        typed = infer_shapes(model)
        load_external_data_for_model(typed, str(onnx_path.parent))
        return convert_float_to_float16(typed, keep_io_types=True, disable_shape_infer=True)
    except Exception as error:  # the converter meets what it did not expect with any class
        raise ValueError(
            f"{onnx_path}: cannot be converted to half precision ({type(error).__name__}: {error}); leave --fp16 out"
        ) from error


def _save(model: Any, made: Path) -> None:
    """Write into a folder beside and rename it: whoever sees the file sees all of it."""
    import onnx

    folder = Path(tempfile.mkdtemp(dir=made.parent.parent, prefix=".unfinished-"))
    try:
        onnx.save_model(
            model, str(folder / made.name), save_as_external_data=True, all_tensors_to_one_file=True,
            location=f"{made.name}.weights",
        )  # fmt: skip
        # Another machine may have been first: a lock does not reach across every shared file system.
        with suppress(OSError):
            os.rename(folder, made.parent)
        if not made.is_file():
            raise OSError(f"{folder} could not be renamed to {made.parent}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
