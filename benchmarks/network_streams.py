"""One network with all threads, or two of them with half each: which gives more frames a second."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.settings import ModelFiles

BATCH_FRAMES, NUM_BATCHES, REPEATS = 2, 16, 5


def report(models: ModelFiles, *, num_threads: int) -> int:
    """Print wall and CPU milliseconds a frame of the detector and the pose network."""
    for path in (models.detector, models.pose):
        ways = {streams: _open(path, num_threads // streams) for streams in (1, 2)}
        times: dict[int, list[tuple[float, float]]] = {streams: [] for streams in ways}
        for _ in range(REPEATS):
            for streams, session in ways.items():
                times[streams].append(_run(session, streams))
        for streams, measured in times.items():
            wall, cpu = (1000 * statistics.median(m[i] for m in measured) for i in (0, 1))
            print(f"{path.name}: {streams} x {num_threads // streams} threads: {wall:.1f} ms a frame, {cpu:.1f} of CPU")
    return 0


def _open(path: Path, num_threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, streams: int) -> tuple[float, float]:
    first = session.get_inputs()[0]
    batch = np.random.default_rng(0).random((BATCH_FRAMES, *first.shape[1:]), np.float32)
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda _: session.run(None, {first.name: batch}) and None, range(NUM_BATCHES)))
    num_frames = BATCH_FRAMES * NUM_BATCHES
    return (time.perf_counter() - start) / num_frames, (time.process_time() - cpu) / num_frames
