"""A training step of DiT slices beside DiffSynth's: `python benchmarks/train_step.py`, on one GPU within 10 minutes.

Each row is a slice of 4 layers (Animate: 5) with random bf16 weights and inputs, forward and backward; peer and ours
alternate in one process and the medians are compared, after their losses have been. Without a GPU it runs tiny slices,
to show that it works: it prints no figures then. Nothing is downloaded. docs/BENCHMARKS.md says what the rows mean.
"""

import argparse
import functools
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_encoders import encoder_seconds
from step_figures import figures, summary
from step_slices import SLICES, Slice, build
from step_timing import compare, matrix_ceiling, prepare

# (policy, fp8), what decides first: when time runs out every slice has the rows that matter. Out of memory is a row
# that says so.
WAYS: tuple[tuple[str | float, bool], ...] = (
    ("attention", False),
    ("attention", True),
    ("none", False),
    ("none", True),
    ("full", False),
    (0.5, False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row to run."""

    slice_: Slice
    method: str
    policy: str | float
    fp8: bool

    @property
    def name(self) -> dict[str, Any]:
        return {"variant": self.slice_.variant, "method": self.method, "policy": self.policy, "fp8": self.fp8}


@dataclass(kw_only=True, slots=True)
class Deadline:
    """The time that is left, by the monotonic clock, against the longest row so far."""

    at: float
    longest: float = 0.0

    def allows_another(self) -> bool:
        return self.at - time.monotonic() > self.longest

    def took(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)


def measure(case: Case, encoders: dict[str, float] | str, *, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row; what does not run here is a note."""
    tiny = device.type == "cpu"
    peer, ours, inputs = build(case.slice_, case.method, device, tiny)
    try:
        prepare(ours, case.policy, case.fp8, "aot_eager_decomp_partition" if tiny else "inductor")
        timed = compare(case.slice_, peer, ours, inputs, fp8=case.fp8, repeats=repeats, device=device)
    except torch.OutOfMemoryError:
        return {**case.name, "note": "out of memory"}
    except RuntimeError as error:  # the losses differ, or this way does not run here: the others go on
        return {**case.name, "note": str(error)}
    finally:
        del peer, ours, inputs
        gc.collect()  # compiled blocks hold themselves in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if tiny:
        return {**case.name, "note": "ran" if isinstance(encoders, dict) else f"ran; encoders: {encoders}"}
    return {**case.name, **figures(case.slice_, case.method, case.policy, timed, encoders)}


def rows(cases: list[Case], deadline: Deadline, *, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Every case in order; those that the deadline leaves no time for are listed."""

    @functools.cache
    def encoders(slice_: str) -> dict[str, float] | str:
        case = next(case for case in cases if case.slice_.variant == slice_)
        return encoder_seconds(case.slice_, device, device.type == "cpu")

    for case in cases:
        if not deadline.allows_another():
            yield {**case.name, "note": "not run: no time"}
            continue
        seconds_of_encoders = encoders(case.slice_.variant)
        started = time.monotonic()
        yield measure(case, seconds_of_encoders, device=device, repeats=repeats)
        deadline.took(time.monotonic() - started)


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, so that whoever stops the run finds the rows so far."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=[slice_.variant for slice_ in SLICES])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--policies", nargs="+", default=list(dict.fromkeys(str(policy) for policy, _ in WAYS)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.5, help="no row is started that would end later")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    deadline_from = time.monotonic()
    arguments = parse(argv)
    logging.basicConfig(level=logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Any] = {"device": "cpu", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device.type == "cpu":
        print("no GPU: tiny slices, to show that every way runs; no figures are claimed")
    else:
        about |= {"device": torch.cuda.get_device_name(), "matrix_tflops": round(matrix_ceiling(device))}
    print(json.dumps(about), flush=True)
    cases = [
        Case(slice_=slice_, method=method, policy=policy, fp8=fp8)
        for policy, fp8 in WAYS
        for slice_ in SLICES
        for method in arguments.methods
        if slice_.variant in arguments.variants and str(policy) in arguments.policies
    ]
    deadline = Deadline(at=deadline_from + 60 * arguments.minutes)
    found: list[dict[str, Any]] = []
    for row in rows(cases, deadline, device=device, repeats=arguments.repeats):
        found.append(row)
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            write(arguments.out, {**about, "rows": found, "summary": summary(found)})
    for line in summary(found):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
