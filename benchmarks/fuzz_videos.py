"""Read damaged videos in worker processes and count what comes of them: frames, a reason, a crash, a hang.

    python benchmarks/fuzz_videos.py 500 --seed 0

Cuts the demo videos short, without coding them anew, and codes two as HEVC in mkv and VP9 in webm; damages copies of
them (truncation, flipped bits, random or zeroed or missing ranges, nothing but random bytes), and reads each with
`probe` and `stream_frames`. Exits with 1 after a crash, a hang or an error that is not meant for the user.
"""

import argparse
import collections
import contextlib
import json
import random
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEMO_VIDEOS = Path(__file__).parents[1] / "demo/videos"
NUM_FRAMES = 12
WORKER_MEMORY_BYTES = 6 << 30
_HEADER_BYTES = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_cases", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-seconds", type=float, default=20.0)
    parser.add_argument("--keep", type=Path, help="folder for the files that crash, hang or raise another error")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    started = time.monotonic()
    counts, longest = run(
        arguments.num_cases, seed=arguments.seed, timeout_seconds=arguments.timeout_seconds, keep=arguments.keep
    )
    for (kind, what), count in sorted(counts.items()):
        print(f"{count:6d}  {kind:7s} {what}")
    print(f"{sum(counts.values())} cases in {time.monotonic() - started:.0f} s, the slowest took {longest:.1f} s")
    return int(any(kind in ("crash", "hang", "bug") for kind, _ in counts))


def run(
    num_cases: int, *, seed: int, timeout_seconds: float, keep: Path | None = None
) -> tuple[collections.Counter[tuple[str, str]], float]:
    """Count (kind, what) over damaged files: kind is frames, reason, crash, hang or bug. Also the longest time."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch, Worker() as worker:
        sources = make_sources(Path(scratch))
        for number, (name, data) in enumerate(damaged(sources, num_cases, seed)):
            path = Path(scratch) / f"case{sources[number % len(sources)].suffix}"
            path.write_bytes(data)
            started = time.monotonic()
            kind, what = worker.read(path, timeout_seconds)
            longest = max(longest, time.monotonic() - started)
            counts[kind, what] += 1
            if keep is not None and kind in ("crash", "hang", "bug"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind}-{seed}-{number}-{name}{path.suffix}").write_bytes(data)
    return counts, longest


def make_sources(folder: Path) -> list[Path]:
    """Short videos: the demo's own packets, and other codecs and containers."""
    sources = []
    for video in sorted(DEMO_VIDEOS.glob("*.mp4")):
        sources.append(folder / f"{video.stem}.mp4")
        _cut(video, sources[-1])
    sources += [folder / "hevc.mkv", folder / "vp9.webm", folder / "h264.ts"]
    for path, codec in zip(sources[-3:], ("libx265", "libvpx-vp9", "libx264"), strict=True):
        _recode(DEMO_VIDEOS / "two_people.mp4", path, codec)
    return sources


def _cut(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.dts is None or number >= NUM_FRAMES:
                break
            packet.stream = stream
            writer.mux(packet)


def _recode(source: Path, target: Path, codec: str) -> None:
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "6"}
        stream = writer.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 320, 262, "yuv420p"
        for number, frame in enumerate(reader.decode(video=0)):
            if number >= NUM_FRAMES:
                break
            writer.mux(stream.encode(frame.reformat(320, 262)))
        writer.mux(stream.encode())


def damaged(sources: list[Path], num_cases: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (kind of damage, bytes), each source in turn."""
    contents = [path.read_bytes() for path in sources]
    for number in range(num_cases):
        randomly = random.Random(f"{seed}/{number}")
        name = randomly.choice(list(DAMAGES))
        yield name, DAMAGES[name](contents[number % len(contents)], randomly)


def _truncated(data: bytes, randomly: random.Random) -> bytes:
    return data[: randomly.randrange(len(data))]


def _flipped(data: bytes, randomly: random.Random, low: int, high: int) -> bytes:
    result = bytearray(data)
    for _ in range(randomly.choice([1, 4, 32, 256])):
        result[randomly.randrange(low, high)] ^= 1 << randomly.randrange(8)
    return bytes(result)


def _header_flipped(data: bytes, randomly: random.Random) -> bytes:
    """Flip bits where the index is: the first bytes, and the `moov` box of MP4, which comes last."""
    moov = data.find(b"moov")
    at_end = moov >= 0 and randomly.random() < 0.8
    low, high = (moov, len(data)) if at_end else (0, min(_HEADER_BYTES, len(data)))
    return _flipped(data, randomly, low, high)


def _range(data: bytes, randomly: random.Random) -> tuple[int, int]:
    low = randomly.randrange(len(data))
    return low, min(len(data), low + randomly.choice([16, 512, 16384]))


def _zeroed(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + bytes(high - low) + data[high:]


def _randomised(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + randomly.randbytes(high - low) + data[high:]


def _missing(data: bytes, randomly: random.Random) -> bytes:
    low, high = _range(data, randomly)
    return data[:low] + data[high:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncated,
    "header-bits": _header_flipped,
    "payload-bits": lambda data, randomly: _flipped(data, randomly, 0, len(data)),
    "zeroed": _zeroed,
    "random-range": _randomised,
    "missing-range": _missing,
    "random-bytes": lambda data, randomly: randomly.randbytes(randomly.randrange(1, 65536)),
    "random-after-magic": lambda data, randomly: data[:64] + randomly.randbytes(randomly.randrange(1, 65536)),
}


class Worker:
    """A process that reads videos, replaced after a crash or a hang."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def read(self, path: Path, timeout_seconds: float) -> tuple[str, str]:
        """Say what comes of a file: frames, reason, bug (another exception), crash or hang."""
        if self.process is None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._answer(120.0)  # it says when its imports are done
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
            answer = self._answer(timeout_seconds)
        except BrokenPipeError:
            answer = None
        if answer is None:
            return_code = self.process.poll()
            self._stop()
            if return_code is None:
                return "hang", f"longer than {timeout_seconds:g} s"
            return "crash", f"exit status {return_code}"
        return answer["kind"], answer["what"]

    def _answer(self, timeout_seconds: float) -> dict[str, Any] | None:
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_seconds)
        line = self.process.stdout.readline() if ready else ""
        if ready and not line:
            self.process.wait()
        return json.loads(line) if line else None

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None and self.process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # what was not read by it
                self.process.stdin.close()
            self.process.stdout.close()
        self.process = None


def work() -> int:
    """Read the videos named on standard input; answer with a line of JSON each."""
    import resource

    import numpy as np

    from preprocessing.video import UserVideoError, probe, stream_frames

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        path, num_frames = line.strip(), 0
        try:
            info = probe(path)
            for batch in stream_frames(path, np.arange(info.num_frames), chunk_frames=4):
                num_frames += len(batch)
            answer = {"kind": "frames", "what": "all of them"}
        except UserVideoError as error:
            message = str(error).replace(path, "FILE")
            answer = {"kind": "reason", "what": re.sub(r"\d+", "N", message)[:110]}
        except Exception as error:
            answer = {"kind": "bug", "what": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    raise SystemExit(main())
