"""Plans of shipped recipes on 8, 64 and 512 GPUs, as a table: `python benchmarks/plan_tables.py [--rows t2v-a14b ...]`.

docs/MULTI_GPU_TRAINING.md holds what it printed. One simulation a row and number of GPUs, half a minute each.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from wan_accel.plan.estimate import Estimate, Planner
from wan_accel.plan.gpus import chosen_gpus, read_gpus
from wan_accel.plan.layout import Layout
from wan_accel.plan.run import ask_of, quiet
from wan_accel.plan.verdict import GIB
from wan_accel.recipe.load import load_recipe

REPLICAS = {8: 1, 64: 1, 512: 8}
GPU = "H100"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A recipe on clips of one shape, and its Ulysses degree."""

    recipe: str
    shape: str
    ulysses: int


ROWS = [
    Row(recipe="t2v-1.3b/full", shape="81,480,832", ulysses=1),
    Row(recipe="ti2v-5b/lora", shape="121,704,1280", ulysses=1),
    Row(recipe="ti2v-5b/full", shape="121,704,1280", ulysses=1),
    Row(recipe="t2v-a14b/lora", shape="81,480,832", ulysses=4),
    Row(recipe="t2v-a14b/lora_pair", shape="81,480,832", ulysses=4),
    Row(recipe="t2v-a14b/full", shape="81,720,1280", ulysses=8),
    Row(recipe="i2v-a14b/lora", shape="81,720,1280", ulysses=8),
    Row(recipe="i2v-a14b/full", shape="81,480,832", ulysses=4),
    Row(recipe="animate-14b/lora", shape="77,640,640", ulysses=4),
    Row(recipe="animate-14b/full", shape="77,640,640", ulysses=4),
]


def plan(row: Row, num_gpus: int) -> Estimate:
    """A recipe's plan; the global batch has a sample for each data rank at least, and 8."""
    layout = Layout(
        engine="fsdp2" if REPLICAS[num_gpus] == 1 else "hsdp",
        world_size=num_gpus,
        ulysses=row.ulysses,
        dp_replicate=REPLICAS[num_gpus],
    )
    overrides = [
        f"parallel.ulysses={row.ulysses}",
        f"data.global_batch.samples={max(num_gpus // row.ulysses, 8)}",
    ]
    ask = ask_of(load_recipe(row.recipe, overrides), layout, shapes=[row.shape], num_clips=1)
    with quiet():
        return Planner(ask, chosen_gpus(read_gpus(None), name=GPU, memory_gib=None)).estimate(ask)


def cells(row: Row, num_gpus: int) -> Iterator[str]:
    """What a table's line says of a plan."""
    found = plan(row, num_gpus)
    peak, time = found.peak, found.times[0]
    state = peak.parameters + peak.gradients + peak.optimizer
    parts = (state, peak.buffers, peak.activations + peak.temporaries)
    yield f"**{peak.total / GIB:.1f}** ({', '.join(f'{part / GIB:.1f}' for part in parts)})"
    yield f"{found.ask.batches.step_samples} in {time.seconds:.1f} s, {time.mfu:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="recipes whose names begin like this; all by default")
    parser.add_argument("--gpus", nargs="+", type=int, choices=tuple(REPLICAS), default=tuple(REPLICAS))
    arguments = parser.parse_args()
    gpus = [name for count in arguments.gpus for name in (f"{count} GPUs", "step, MFU")]
    print(f"| recipe | clips, Ulysses | {' | '.join(gpus)} |")
    print("|---|---|" + "---|" * len(gpus))
    for row in ROWS:
        if arguments.rows is None or row.recipe.startswith(tuple(arguments.rows)):
            plans = [cell for count in arguments.gpus for cell in cells(row, count)]
            clips = f"{row.shape.replace(',', ' x ')}, {row.ulysses}"
            print(f"| {row.recipe} | {clips} | {' | '.join(plans)} |", flush=True)


if __name__ == "__main__":
    main()
