"""Read damaged videos in worker processes and count what comes of them: frames, a reason, a crash, a hang.

    python benchmarks/fuzz_videos.py 500 --seed 0
    python benchmarks/fuzz_videos.py 500 --seed 0 --pipeline animate    # or clips: the whole job, to rows or reasons

Cuts the demo videos short, without coding them anew, and codes two as HEVC in mkv and VP9 in webm; damages copies of
them (truncation, flipped bits, random or zeroed or missing ranges, nothing but random bytes), and reads each with
`probe` and `stream_frames`, or with `--pipeline` hands all of them to `wan-preprocess`, which see fuzz_pipeline.py.
Exits with 1 after a crash, a hang or an error that is not meant for the user.
"""

import argparse
import collections
import contextlib
import json
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from damaged_videos import damaged, make_sources

WORKER_MEMORY_BYTES = 6 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_cases", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-seconds", type=float, default=20.0)
    parser.add_argument("--keep", type=Path, help="folder for the files that crash, hang or raise another error")
    parser.add_argument("--pipeline", choices=["animate", "clips"], help="run `wan-preprocess animate` or `clips`")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    if arguments.pipeline is not None:
        return fuzz_pipeline(arguments)
    started = time.monotonic()
    counts, longest = run(
        arguments.num_cases, seed=arguments.seed, timeout_seconds=arguments.timeout_seconds, keep=arguments.keep
    )
    for (kind, what), count in sorted(counts.items()):
        print(f"{count:6d}  {kind:7s} {what}")
    print(f"{sum(counts.values())} cases in {time.monotonic() - started:.0f} s, the slowest took {longest:.1f} s")
    return int(any(kind in ("crash", "hang", "bug") for kind, _ in counts))


def fuzz_pipeline(arguments: argparse.Namespace) -> int:
    from fuzz_pipeline import report, run_pipeline

    outcome = run_pipeline(
        arguments.pipeline,
        arguments.num_cases,
        seed=arguments.seed,
        timeout_seconds=arguments.timeout_seconds,
        keep=arguments.keep,
    )
    print(report(outcome))
    return int(outcome.num_failures > 0)


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
