"""Peak memory of whole runs, on a video and on one that is 10 times longer."""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from preprocessing.settings import ModelFiles
from preprocessing.video import decode_frames

MOST_GROWTH = 1.15
LENGTHS_SECONDS = {"animate": 9, "clips": 30}  # and 10 times as much
FPS = 30


def report(models: ModelFiles, video: Path) -> int:
    """Print the peaks; 1 where memory grows by more than the target."""
    growths = []
    with tempfile.TemporaryDirectory() as folder:
        for command, seconds in LENGTHS_SECONDS.items():
            peaks = []
            for length in (seconds, 10 * seconds):
                long = Path(folder) / f"{length}s.mp4"
                _write_long(video, long, length * FPS)
                peaks.append(_peak_mib(command, models, long, Path(folder) / f"{command}-{length}"))
                print(f"{command} {length} s: {peaks[-1]:.0f} MiB, the sum of all processes' peaks", flush=True)
            growths.append(peaks[1] / peaks[0])
            met = "met" if growths[-1] <= MOST_GROWTH else "MISSED"
            print(f"{command}: {growths[-1]:.3f} times as much (target <= {MOST_GROWTH}: {met})", flush=True)
    return int(max(growths) > MOST_GROWTH)


def _write_long(source: Path, target: Path, num_frames: int) -> None:
    """A video played forwards and backwards again and again: no cut in it, so that one track lasts throughout."""
    import av

    frames = decode_frames(source).frames_rgb
    there_and_back = np.concatenate([np.arange(len(frames)), np.arange(len(frames) - 2, 0, -1)])
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for index in np.resize(there_and_back, num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[index], format="rgb24")))
        container.mux(stream.encode())


def _peak_mib(command: str, models: ModelFiles, video: Path, output: Path) -> float:
    """Run the command; returns the sum of its processes' peaks."""
    networks = [f"--detector={models.detector}", f"--pose={models.pose}", f"--segmenter={models.segmenter}"]
    line = [sys.executable, "-m", "preprocessing.cli", command, str(video), f"--output={output}"]
    process = psutil.Popen([*line, *(networks if command == "animate" else [])], stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error, FileNotFoundError, ProcessLookupError, IndexError):
                status = Path(f"/proc/{one.pid}/status").read_text()
                peaks[one.pid] = int(status.split("VmHWM:")[1].split()[0])
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"wan-preprocess {command} ended with {process.returncode}")
    return sum(peaks.values()) / 1024
