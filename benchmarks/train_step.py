"""A training step of DiT slices beside DiffSynth's: `python benchmarks/train_step.py`, on one GPU within 10 minutes.

Each row is a slice of 4 layers (Animate: 5) with random bf16 weights and inputs, forward and backward; peer and ours
alternate in one process and the medians are compared, after their losses have been. Without a GPU it runs tiny slices,
to show that it works: it prints no figures then. Nothing is downloaded. docs/BENCHMARKS.md says what the rows mean.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from step_encoders import encoder_seconds
from step_figures import figures, summary
from step_slices import SLICES, Slice, build, our_velocity, peer_attention
from step_timing import compare, fp8_gaps, prepare

from wan_accel.doctor_links import product_tflops
from wan_accel.models.attention import ATTENTION_BACKENDS, check_attention
from wan_accel.models.denoiser import set_attention

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
    attention: str = "sdpa"

    @property
    def name(self) -> dict[str, Any]:
        names = ("method", "policy", "fp8", "attention")
        return {"variant": self.slice_.variant, **{name: getattr(self, name) for name in names}}


@dataclass(kw_only=True, slots=True)
class Deadline:
    """The time that is left, by the monotonic clock, against the longest work of a kind so far."""

    at: float
    longest: dict[str, float] = field(default_factory=dict)

    def allows(self, *kinds: str) -> bool:
        """Tell whether work of these kinds, one after the other, would end before the deadline."""
        return self.at - time.monotonic() > sum(self.longest.get(kind, 0.0) for kind in kinds)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - started)


def measure(
    case: Case, encoders: dict[str, float] | str, *, device: torch.device, repeats: int, matrix_tflops: float
) -> dict[str, Any]:
    """One row; what does not run here is a note."""
    tiny = device.type == "cpu"
    backend = "aot_eager_decomp_partition" if tiny else "inductor"
    peer, ours, inputs = build(case.slice_, case.method, device, tiny)
    row = case.name
    try:
        set_attention(ours, case.attention)
        with torch.no_grad():
            plain = our_velocity(ours, inputs) if case.fp8 else None
        prepare(ours, case.policy, case.fp8, backend)
        if plain is not None:
            gaps = fp8_gaps(plain, our_velocity(ours, inputs).detach())
            row |= {f"fp8_{name}_gap": round(gap, 5) for name, gap in gaps.items()}
        timed = compare(case.slice_, peer, ours, inputs, fp8=case.fp8, repeats=repeats, device=device)
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    except RuntimeError as error:  # the losses differ, or this way does not run here: the others go on
        return {**row, "note": str(error)}
    finally:
        del peer, ours, inputs
        gc.collect()  # compiled blocks hold themselves in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if tiny:
        return {**row, "note": "ran" if isinstance(encoders, dict) else f"ran; encoders: {encoders}"}
    return row | figures(case.slice_, case.method, case.policy, timed, encoders, matrix_tflops=matrix_tflops)


def rows(cases: list[Case], deadline: Deadline, *, device: torch.device, **options: Any) -> Iterator[dict[str, Any]]:
    """Every case in order, by `measure`; those that the deadline leaves no time for are listed.

    The encoders of a variant come before its first row, if there is time for both.
    """
    encoders: dict[str, dict[str, float] | str] = {}
    for case in cases:
        variant = case.slice_.variant
        if variant not in encoders and deadline.allows("encoders", "row"):
            with deadline.timed("encoders"):
                encoders[variant] = encoder_seconds(case.slice_, device, device.type == "cpu")
        if variant not in encoders or not deadline.allows("row"):
            yield {**case.name, "note": "not run: no time"}
            continue
        with deadline.timed("row"):
            row = measure(case, encoders[variant], device=device, **options)
        yield row


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
    parser.add_argument("--attention", choices=list(ATTENTION_BACKENDS), default="sdpa", help="model.attention of ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.5, help="no row is started that would end later")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    return parser.parse_args(argv)


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    return [
        Case(slice_=slice_, method=method, policy=policy, fp8=fp8, attention=arguments.attention)
        for policy, fp8 in WAYS
        for slice_ in SLICES
        for method in arguments.methods
        if slice_.variant in arguments.variants and str(policy) in arguments.policies
    ]


def main(argv: list[str] | None = None) -> int:
    deadline_from = time.monotonic()
    arguments = parse(argv)
    logging.basicConfig(level=logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_attention(arguments.attention, device)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    matrix_tflops = product_tflops(device)
    about: dict[str, Any] = {"device": "cpu", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    about["diffsynth_attention"] = peer_attention()
    if device.type == "cpu":
        print("no GPU: tiny slices, to show that every way runs; no figures are claimed")
    else:
        about |= {"device": torch.cuda.get_device_name(), "matrix_tflops": round(matrix_tflops)}
    print(json.dumps(about), flush=True)
    deadline = Deadline(at=deadline_from + 60 * arguments.minutes)
    found: list[dict[str, Any]] = []
    for row in rows(
        cases_of(arguments), deadline, device=device, repeats=arguments.repeats, matrix_tflops=matrix_tflops
    ):
        found.append(row)
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            write(arguments.out, {**about, "rows": found, "summary": summary(found)})
    for line in summary(found):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
