"""One ONNX network: opened with the provider asked for, run over batches of any size."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from preprocessing.half_precision import half_precision
from preprocessing.network_files import cache_folder, content_hash, first_input, read_graph
from preprocessing.providers import PROVIDERS, Provider, Setup, find_provider, providers_of_session
from preprocessing.side_by_side import SideBySide
from preprocessing.types import Float


class NetworkOptions(TypedDict, total=False):
    """How a network runs: see `OnnxModel`."""

    provider: str
    device_id: int
    num_threads: int
    batch_frames: int
    fp16: bool


class OnnxModel:
    """A network with one input, whose names are read from the file.

    `batch_frames` is the most that one run takes: the file's own batch size where that is fixed.
    `side_by_side` works on several batches at once. `seconds_in_network`: for how long any of them was in the network.
    """

    def __init__(
        self,
        onnx_path: str | Path,
        *,
        provider: str = "cpu",
        device_id: int = 0,
        num_threads: int = 1,
        batch_frames: int = 8,
        fp16: bool = False,
    ) -> None:
        """Open the file, or the `end2end.onnx` of a folder: a network beyond 2 GB lies there with its weights.

        provider: cpu, cuda or tensorrt, the latter two on GPU `device_id`. num_threads: of the CPU, in all, see
        `SideBySide`. fp16: compute in half precision; inputs and outputs stay as they are.

        Raises ValueError for a missing or damaged file and for a provider that this onnxruntime lacks or cannot start:
        it is never replaced by another one.
        """
        path = Path(onnx_path)
        self.path = path / "end2end.onnx" if path.is_dir() else path
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such model file")
        wanted = find_provider(provider)
        # A provider that builds engines makes the numbers smaller by itself.
        file = half_precision(self.path) if fp16 and not wanted.builds_engines else self.path
        setup = _setup(file, wanted, device_id=device_id, batch_frames=batch_frames, fp16=fp16)
        self.side_by_side = SideBySide(num_threads)
        self._session = _open(self.path, file, wanted, setup, self.side_by_side.threads_each)
        self._input = self._session.get_inputs()[0]
        self._outputs = self._session.get_outputs()
        self._dtype = np.float16 if self._input.type == "tensor(float16)" else np.float32
        self.seconds_in_network = 0.0
        self._lock, self._num_running, self._running_since = threading.Lock(), 0, 0.0
        fixed = self._input.shape[0]
        self.batch_frames = fixed if isinstance(fixed, int) else batch_frames
        self._pads_batch = isinstance(fixed, int)

    @property
    def input_shape(self) -> tuple[Any, ...]:
        """Shape in the file; names in place of sizes that are free."""
        return tuple(self._input.shape)

    @property
    def metadata(self) -> dict[str, str]:
        """What the exporter noted in the file."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, batch: Float) -> Float:
        """Run the network on one batch of at most `batch_frames` and return its first output."""
        return self.run_all(batch, num_outputs=1)[0]

    def run_all(self, batch: Float, *, num_outputs: int | None = None) -> list[Float]:
        """Run the network on one batch and return its first `num_outputs` outputs, or all, as float32 if not integer.

        A network of half precision gets and gives what it wants; the caller sees float32.
        """
        num = len(batch)
        if num > self.batch_frames:
            raise ValueError(f"{num} inputs for {self.path.name}, it takes {self.batch_frames} at a time")
        if self._pads_batch and num < self.batch_frames:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch_frames - num, axis=0)])
        feed = {self._input.name: np.ascontiguousarray(batch, self._dtype)}
        with self._counted():
            outputs = self._session.run([output.name for output in self._outputs[:num_outputs]], feed)
        arrays = [np.asarray(output)[:num] for output in outputs]
        return [array.astype(np.float32) if array.dtype == np.float16 else array for array in arrays]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the time; two runs at once count once."""
        with self._lock:
            if self._num_running == 0:
                self._running_since = time.perf_counter()
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0:
                    self.seconds_in_network += time.perf_counter() - self._running_since


def _setup(file: Path, provider: Provider, *, device_id: int, batch_frames: int, fp16: bool) -> Setup:
    """Only a provider that builds engines must know the network, by its content, before it opens it."""
    setup = Setup(device_id=device_id, batch_frames=batch_frames, fp16=fp16)
    if not provider.builds_engines:
        return setup
    graph = read_graph(file)
    name, shape = first_input(graph)
    engines = cache_folder() / "tensorrt" / content_hash(file, graph)
    engines.mkdir(parents=True, exist_ok=True)
    return replace(setup, input_name=name, input_shape=shape, engines=engines)


def _open(path: Path, file: Path, provider: Provider, setup: Setup, num_threads: int) -> Any:
    """Start an onnxruntime.InferenceSession of `file`, the network at `path` or what it was converted to."""
    import onnxruntime

    if provider is not PROVIDERS["cpu"]:
        onnxruntime.preload_dlls()  # CUDA and cuDNN from pip packages, which the loader does not find by itself
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    chosen = providers_of_session(provider, setup)
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception classes share no public base
        raise ValueError(
            f"{path}: not a complete ONNX model, or none that {provider.name} takes ({str(error).splitlines()[0]})"
        ) from error
    if provider.name not in session.get_providers():
        raise ValueError(
            f"{path}: {provider.name} is in this onnxruntime but does not start here; is there a GPU "
            f"(nvidia-smi), and are its libraries: pip install {provider.packages}"
        )
    return session
