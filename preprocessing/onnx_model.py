"""One ONNX network: opened with the provider asked for, run over batches of any size."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.types import Float

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OnnxModel:
    """A network with one input, whose names are read from the file.

    `batch_frames` is the most that one run takes: the file's own batch size where that is fixed.
    `seconds_in_network`: how long runs have taken in all.
    """

    def __init__(
        self, onnx_path: str | Path, *, provider: str = "cpu", num_threads: int = 1, batch_frames: int = 8
    ) -> None:
        """Open the file, or the `end2end.onnx` of a folder: a network beyond 2 GB lies there with its weights.

        `num_threads` is of the CPU, inside one operator.

        Raises ValueError for a missing or damaged file and for a provider that this onnxruntime lacks: it is
        never replaced by another one.
        """
        import onnxruntime

        path = Path(onnx_path)
        path = path / "end2end.onnx" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such model file")
        wanted = _PROVIDERS.get(provider, provider)
        available = onnxruntime.get_available_providers()
        if wanted not in available:
            raise ValueError(
                f"provider {provider!r} is not in this onnxruntime, which has {', '.join(available)}: "
                "choose one of these, or install the build of onnxruntime that has it"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:  # onnxruntime's own exception classes share no public base
            raise ValueError(f"{path}: not a complete ONNX model ({str(error).splitlines()[0]})") from error
        if wanted not in self._session.get_providers():
            raise ValueError(f"{path}: provider {provider!r} is in this onnxruntime but does not start here")
        self.path = path
        self._input = self._session.get_inputs()[0]
        self._outputs = self._session.get_outputs()
        self._dtype = np.float16 if self._input.type == "tensor(float16)" else np.float32
        self.seconds_in_network = 0.0
        fixed = self._input.shape[0]
        self.batch_frames = fixed if isinstance(fixed, int) else batch_frames
        self._pads_batch = isinstance(fixed, int)

    @property
    def input_shape(self) -> tuple[Any, ...]:
        """Shape in the file; names in place of sizes that are free."""
        return tuple(self._input.shape)

    @property
    def output_shape(self) -> tuple[Any, ...]:
        """Shape in the file; names in place of sizes that are free."""
        return self.output_shapes[0]

    @property
    def output_shapes(self) -> list[tuple[Any, ...]]:
        """Shapes of all outputs in the file; names in place of sizes that are free."""
        return [tuple(output.shape) for output in self._outputs]

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
        start = time.perf_counter()
        outputs = self._session.run([output.name for output in self._outputs[:num_outputs]], feed)
        self.seconds_in_network += time.perf_counter() - start
        arrays = [np.asarray(output)[:num] for output in outputs]
        return [array.astype(np.float32) if array.dtype == np.float16 else array for array in arrays]
