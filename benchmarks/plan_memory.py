"""What `wan-accel plan` says of slices beside what a GPU allocates: `python benchmarks/plan_memory.py`, in minutes.

A slice is the first layers of a released model, with random bf16 weights as FSDP2 gathers them, forward and backward.
Beyond its weights and inputs it allocates activations and temporaries: the part of a plan that is traced; the rest are
sizes of tensors. Without a GPU it prints what the trace says, and compares nothing. docs/BENCHMARKS.md has the figures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from wan_accel.assemble import Techniques
from wan_accel.draws import Bucket
from wan_accel.lora import LoraSettings
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.recompute import recompute_of
from wan_accel.models.variants import VARIANTS
from wan_accel.plan.batch import micro_batch
from wan_accel.plan.layout import Layout
from wan_accel.plan.step import run_micro_step
from wan_accel.plan.trace import MicroStep, Tracer, drop_gradients, first_layers, gathered_model
from wan_accel.plan.verdict import GIB
from wan_accel.plan.weights import released_shapes

BUCKETS = {"t2v-a14b": Bucket(81, 480, 832), "ti2v-5b": Bucket(121, 704, 1280), "animate-14b": Bucket(77, 640, 640)}
# (policy, compiled)
WAYS: tuple[tuple[Any, bool], ...] = (
    ("attention", True),
    ("attention", False),
    ("full", True),
    ("none", True),
    (0.5, True),
)
ALONE = Layout(engine="fsdp2", world_size=1)
CLOSE = 0.1  # the plan is right where it is within this share of what was allocated


def step_for(variant: str, method: str, policy: Any, is_compiled: bool) -> MicroStep:
    row = VARIANTS[variant]
    lora = LoraSettings(r=32) if method == "lora" else None
    techniques = Techniques(
        lora=lora, torch_dtype=torch.bfloat16, activation_checkpointing=policy, compile=is_compiled
    )
    return MicroStep(
        variant=row, shapes=released_shapes(row), techniques=techniques, bucket=BUCKETS[variant], num_samples=1
    )


def planned(step: MicroStep, num_layers: int) -> dict[str, float]:
    kept, working = Tracer(step, ALONE).run(num_layers)
    return {"planned_kept_gib": round(kept / GIB, 3), "planned_peak_gib": round((kept + working) / GIB, 3)}


def allocated(step: MicroStep, num_layers: int, device: torch.device) -> dict[str, float]:
    """The same step on a GPU, the second of two: what is allocated beside the weights."""
    shapes = first_layers(step.shapes, num_layers)
    model = gathered_model(step, shapes, ALONE)
    if step.techniques.compile:
        torch._dynamo.reset()
        compile_blocks(model, num_shapes=1, budget=recompute_of(step.techniques.activation_checkpointing).budget)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    drop_gradients(model)
    before = torch.cuda.memory_allocated(device)
    with torch.device(device):
        empty = micro_batch(step.variant, shapes, step.bucket, 1)
    batch = {name: value.zero_() for name, value in empty.items()}
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        kept = run_micro_step(model, step.variant, batch, lambda: torch.cuda.memory_allocated(device))
    peak = torch.cuda.max_memory_allocated(device)
    return {"kept_gib": round((kept - before) / GIB, 3), "peak_gib": round((peak - before) / GIB, 3)}


def row(step: MicroStep, name: dict[str, Any], num_layers: int) -> dict[str, Any]:
    found = {**name, "layers": num_layers, **planned(step, num_layers)}
    if not torch.cuda.is_available():
        return {**found, "note": "no GPU: not compared"}
    try:
        found |= allocated(step, num_layers, torch.device("cuda"))
    except torch.OutOfMemoryError:
        return {**found, "note": "out of memory"}
    error = found["planned_peak_gib"] / found["peak_gib"] - 1
    return {**found, "error": round(error, 3), "close": abs(error) <= CLOSE}


def main(argv: list[str] | None = None) -> int:
    """Print a row a case; returns 1 if one is not within 10%."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(BUCKETS))
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--policies", nargs="+", default=list(dict.fromkeys(str(policy) for policy, _ in WAYS)))
    parser.add_argument("--layers", type=int, default=5, help="of each model; 5 have one face block")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        for method in arguments.methods:
            for policy, is_compiled in (way for way in WAYS if str(way[0]) in arguments.policies):
                name = {"variant": variant, "method": method, "policy": policy, "compile": is_compiled}
                rows.append(row(step_for(variant, method, policy, is_compiled), name, arguments.layers))
                print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        content = {"device": device, "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=1))
    return int(not all(one.get("close", True) for one in rows))


if __name__ == "__main__":
    sys.exit(main())
