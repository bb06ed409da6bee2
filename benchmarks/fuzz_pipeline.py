"""Damaged videos through the whole job: `wan-preprocess animate` or `clips` on a folder of them.

What may come of a video: rows, or a record in rejected.jsonl with a reason that is meant for the user, or both (rows up
to where the stream is damaged). What counts as a failure: `crashed` and `timeout` (the job survives them, the stage
did not), `unusable` (an exception that nobody foresaw), a video without an outcome, rows that `verify` refuses.
"""

import collections
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from damaged_videos import damaged, make_sources

REPOSITORY = Path(__file__).parents[1]
MODELS = {"detector": "person_detector", "pose": "wholebody133", "segmenter": "person_segmenter"}
WORKER_MEMORY_BYTES = 6 << 30
FAILURES = ("crashed", "timeout", "unusable", "no outcome", "unsound rows", "exit code")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOutcome:
    """How many videos gave (`rows`, `reason` or `rows and reason`; why), how many rows, and how long it took."""

    counts: collections.Counter[tuple[str, str]]
    num_rows: int
    seconds: float
    slowest_seconds: float

    @property
    def num_failures(self) -> int:
        return sum(count for (_, what), count in self.counts.items() if what.startswith(FAILURES))


def run_pipeline(
    kind: str, num_cases: int, *, seed: int, timeout_seconds: float, keep: Path | None = None, workers: int = 2
) -> PipelineOutcome:
    """Damage `num_cases` videos, run the job once over all of them, and look at what became of each."""
    from preprocessing.ledger import Ledger
    from preprocessing.verify import verify_clips
    from wan_accel.data import store

    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch), Path(scratch) / "clips"
        cases = _write_cases(folder, num_cases, seed)
        manifest = folder / "cases.csv"
        manifest.write_text("path\n" + "".join(f"{path}\n" for path in cases))
        started = time.monotonic()
        code = _run_job(kind, manifest, output, timeout_seconds=timeout_seconds, workers=workers)
        seconds = time.monotonic() - started
        outcomes = Ledger(output).outcomes
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for path in cases:
            counts[_fate(path, outcomes.get(str(path)))] += 1
            if keep is not None and _fate(path, outcomes.get(str(path)))[1].startswith(FAILURES):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind}-{seed}-{path.name}").write_bytes(path.read_bytes())
        num_rows = sum(sidecar.rows for sidecar in store.parts(output).values())
        for problem in verify_clips(output).problems if num_rows else []:
            counts["rows", f"unsound rows: {problem.message}"] += 1
        if code not in ((0,) if num_rows else (0, 2)):
            counts["job", f"exit code {code}"] += 1
    slowest = max((outcome.seconds for outcome in outcomes.values()), default=0.0)
    return PipelineOutcome(counts=counts, num_rows=num_rows, seconds=seconds, slowest_seconds=slowest)


def _write_cases(folder: Path, num_cases: int, seed: int) -> list[Path]:
    sources = make_sources(folder)
    cases = []
    for number, (name, data) in enumerate(damaged(sources, num_cases, seed)):
        cases.append(folder / f"{number:05}-{name}{sources[number % len(sources)].suffix}")
        cases[-1].write_bytes(data)
    return cases


def _run_job(kind: str, manifest: Path, output: Path, *, timeout_seconds: float, workers: int) -> int:
    """The command as a user would run it, with clips so small that the networks hardly count."""
    command = [sys.executable, "-m", "preprocessing.cli", kind, str(manifest), f"--output={output}", "--num-frames=5"]
    command += ["--fps=30", "--resolution-area=128*160", f"--timeout-seconds={timeout_seconds:g}"]
    command += [f"--workers-per-device={workers}"]
    if kind == "animate":
        command += [f"--{name}={REPOSITORY}/demo/models/{file}.onnx" for name, file in MODELS.items()]
        command += ["--num-threads=1", "--people=all"]
    limit = WORKER_MEMORY_BYTES
    finished = subprocess.run(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    return finished.returncode


def _fate(path: Path, outcome: object) -> tuple[str, str]:
    """What a video gave, and why; numbers and paths as N and FILE, so that like reasons are counted together."""
    from preprocessing.ledger import Outcome

    if not isinstance(outcome, Outcome):
        return "nothing", "no outcome"
    given = " and ".join(name for name, some in (("rows", outcome.num_clips), ("reason", outcome.rejected)) if some)
    if not given:
        return "nothing", "no outcome: neither rows nor a reason"
    if not outcome.rejected:
        return given, "all of it"
    record = outcome.rejected[0]
    detail = re.sub(r"\d+", "N", record["detail"].replace(str(path), "FILE").replace(str(path.parent), "FOLDER"))
    return given, f"{record['reason']}: {detail[:110]}"


def report(outcome: PipelineOutcome) -> str:
    """One line a fate, and a line of totals."""
    lines = [f"{count:6d}  {given:15s} {what}" for (given, what), count in sorted(outcome.counts.items())]
    total = sum(count for (given, _), count in outcome.counts.items() if given != "job")
    lines.append(
        f"{total} videos in {outcome.seconds:.0f} s, the slowest took {outcome.slowest_seconds:.1f} s: "
        f"{outcome.num_rows} rows, {outcome.num_failures} failures"
    )
    return "\n".join(lines)
