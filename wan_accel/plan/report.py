"""What `wan-accel plan` prints: a table, or everything as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wan_accel.plan.estimate import Estimate
from wan_accel.plan.formula import PARTS
from wan_accel.plan.search import Found, Order
from wan_accel.plan.verdict import GIB, Budget
from wan_accel.plan.weights import Unit, total

_METHODS = {
    "simulated": "simulated: a micro step of rank 0 on fake tensors",
    "formula": "by formula; activations and temporaries traced on fake tensors",
}
_NAMES = {"ema": "moving average", "buffers": "gathered, reduced"}
_PREDICTED = "predicted from data sheets and shares measured on one H100; edit the table with --gpus"
UNVERIFIED = "not verified on a GPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A recipe's name and estimate, the parameters of an expert, what a GPU holds, and other layouts in an order."""

    name: str
    estimate: Estimate
    units: Sequence[Unit]
    budget: Budget
    found: Sequence[Found]
    order: Order


def as_text(report: Report) -> str:
    """The report in lines; the verdict stands last, before other layouts."""
    estimate, peak = report.estimate, report.estimate.peak.total
    parts = (_header(report), _memory(estimate), _traffic(estimate), _more(estimate), _times(estimate))
    lines = [line for part in parts for line in (*part, "")]
    lines.append(report.budget.verdict(peak))
    if report.found:
        lines += ["", f"{report.order} layouts that fit:", *_found(report.found)]
    elif not report.budget.holds(peak) or report.order == "fastest":
        lines += ["", "no other layout that was looked at fits: use more GPUs, smaller clips or a LoRA"]
    return "\n".join(lines)


def _header(report: Report) -> Iterator[str]:
    estimate, ask, batches = report.estimate, report.estimate.ask, report.estimate.ask.batches
    weights = [weight for unit in report.units for weight in unit.weights]
    bucket = batches.bucket
    yield f"{report.name}: {ask.layout.describe()}"
    experts = f"{ask.how.num_experts} x " if ask.how.num_experts > 1 else ""
    yield (
        f"{'model':<11}{experts}{total(weights) / 1e9:.2f} B parameters, {total(weights, trained=True) / 1e9:.3f} B "
        f"trained (shapes of {ask.shapes.folder})"
    )
    yield (
        f"{'batch':<11}{batches.num_samples} x {bucket.num_frames} frames of {bucket.height}x{bucket.width} "
        f"({ask.num_tokens:,} tokens) at once, {batches.num_micro_steps} times a step of {batches.step_samples} samples"
    )
    memory = ask.recipe.memory
    yield (
        f"{'blocks':<11}activation_checkpointing {memory.activation_checkpointing}"
        f"{', compiled' if memory.compile else ''}{', fp8' if memory.fp8 else ''}; {ask.how.optim}"
    )
    yield f"{'memory':<11}{_METHODS[estimate.method]}; {UNVERIFIED}"


def _memory(estimate: Estimate) -> Iterator[str]:
    peak = estimate.peak
    yield f"{'GiB a GPU':<20}{'after a step':>14}  at the peak ({peak.moment})"
    for part in PARTS:
        after, at_peak = getattr(estimate.fixed, part, None), getattr(peak, part)
        if after or at_peak:
            shown = "" if after is None else f"{after / GIB:.2f}"
            yield f"{_NAMES.get(part, part):<20}{shown:>14}{at_peak / GIB:>13.2f}"
    yield f"{'all':<20}{estimate.fixed.total / GIB:>14.2f}{peak.total / GIB:>13.2f}"


def _traffic(estimate: Estimate) -> Iterator[str]:
    if not estimate.traffic:
        yield "no collectives"
        return
    yield f"{'collectives of a micro step':<34}{'calls':>7}{'GiB':>10}"
    for one in estimate.traffic:
        calls = "-" if one.calls is None else str(one.calls)
        yield f"{one.kind:<16}{f'{one.axis}, {one.num_ranks} ranks':<18}{calls:>7}{one.bytes / GIB:>10.2f}"


def _more(estimate: Estimate) -> Iterator[str]:
    disk, fixed = estimate.disk, estimate.fixed
    flops, again = estimate.ask.flops()
    clips = sum(estimate.ask.clips.values())
    staged, always = disk.staged / GIB, fixed.host / GIB
    yield f"{'host':<11}{always:.2f} GiB a GPU, {staged:.2f} GiB more while a checkpoint is staged"
    kept = "all are kept" if disk.kept is None else f"{disk.kept} are kept, one more while it is written"
    yield f"{'disk':<11}{disk.checkpoint / GIB:.2f} GiB a checkpoint ({kept})"
    yield f"{'':<11}{disk.cache / GIB:.2f} GiB of latents and captions of {clips} clips, at most"
    yield f"{'FLOPs':<11}{flops.total / 1e12:,.0f} T a GPU and step, {again.total / 1e12:,.0f} T more are recomputed"


def _times(estimate: Estimate) -> Iterator[str]:
    for time in estimate.times:
        yield (
            f"{time.gpu:<11}{time.seconds:.2f} s a step, MFU {time.mfu:.2f}: compute {time.compute:.2f} s beside "
            f"sharding {time.sharding:.2f} s, exchanges {time.exchanges:.2f} s, optimizer {time.optimizer:.2f} s"
        )
    yield f"{'':<11}{_PREDICTED}" if estimate.times else "no GPU of this memory is in the table: name one with --gpu"


def _found(found: Sequence[Found]) -> Iterator[str]:
    for rank, one in enumerate(found, start=1):
        times = one.estimate.times
        seconds = f"{times[0].seconds:7.2f} s a step ({times[0].gpu})" if times else ""
        peak, changes = one.estimate.peak.total / GIB, "  ".join(one.changes)
        yield f"{rank}. {peak:6.1f} GiB  {seconds}  {one.estimate.method}: {changes}"


def as_json(report: Report) -> str:
    """Everything that the table says, in bytes and seconds."""
    content = {"recipe": report.name, **_estimate(report.estimate, report)}
    content[report.order] = [
        {"changes": list(one.changes), "distance": one.distance, **_estimate(one.estimate, report)}
        for one in report.found
    ]
    return json.dumps(content, indent=2)


def _estimate(estimate: Estimate, report: Report) -> dict[str, Any]:
    ask, budget = estimate.ask, report.budget
    flops, recomputed = ask.flops()
    weights = [weight for unit in report.units for weight in unit.weights]
    batches = ask.batches
    return {
        "fits": budget.holds(estimate.peak.total),
        "verdict": budget.verdict(estimate.peak.total),
        "verified": False,
        "method": estimate.method,
        "gpu_memory": budget.memory,
        "reserve": budget.reserve,
        "variant": ask.variant.name,
        "layout": asdict(ask.layout),
        "memory": asdict(ask.recipe.memory),
        "parameters": total(weights),
        "trained": total(weights, trained=True),
        "num_experts": ask.how.num_experts,
        "shapes": str(ask.shapes.folder),
        "bucket": list(batches.bucket),
        "num_tokens": ask.num_tokens,
        "num_samples": batches.num_samples,
        "num_micro_steps": batches.num_micro_steps,
        "after_a_step": asdict(estimate.fixed),
        "peak": {**asdict(estimate.peak), "total": estimate.peak.total},
        "collectives": [asdict(one) for one in estimate.traffic],
        "disk": asdict(estimate.disk),
        "flops": asdict(flops),
        "recomputed_flops": asdict(recomputed),
        "predicted": [{**asdict(time), "seconds": time.seconds} for time in estimate.times],
    }
