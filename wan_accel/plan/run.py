"""`wan-accel plan`: from options to a report."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

from wan_accel.models.variants import get_variant
from wan_accel.plan.ask import Ask
from wan_accel.plan.buckets import find_clips, parse_shape
from wan_accel.plan.estimate import Planner
from wan_accel.plan.gpus import Gpu, chosen_gpus, read_gpus
from wan_accel.plan.layout import Layout, read_layout
from wan_accel.plan.report import Report, as_json, as_text
from wan_accel.plan.search import nearest, search
from wan_accel.plan.verdict import GIB, Budget, parse_memory
from wan_accel.plan.weights import open_shapes
from wan_accel.recipe.check import check
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the report; returns 0 if the recipe fits, 1 if not.

    Raises:
        ValueError: options or a recipe that cannot be used.
    """
    with contextlib.redirect_stdout(sys.stderr), quiet():  # libraries log to stdout, where the report must be alone
        report = _report(arguments, overrides)
    sys.stdout.write((as_json(report) if arguments.json else as_text(report)) + "\n")
    return 0 if report.budget.holds(report.estimate.peak.total) else 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what torch says of the operators that a simulated step calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _report(arguments: argparse.Namespace, overrides: Sequence[str]) -> Report:
    recipe = load_recipe(arguments.recipe, overrides)
    layout = read_layout(
        arguments.config_file, num_processes=arguments.num_processes, ulysses=recipe.parallel.ulysses,
        num_machines=arguments.num_machines,
    )  # fmt: skip
    ask = ask_of(recipe, layout, shapes=arguments.shape, num_clips=arguments.samples)
    gpus, budget = _gpus(arguments)
    if arguments.search and not gpus:
        raise ValueError("--search compares predicted times: name a GPU of the table, e.g. --gpu H100")
    planner = Planner(ask, gpus)
    estimate = planner.estimate(ask)
    if arguments.search:
        found = search(planner, estimate, budget)
    else:
        found = [] if budget.holds(estimate.peak.total) else nearest(planner, ask, budget)
    return Report(
        name=arguments.recipe, estimate=estimate, units=planner.units, budget=budget, found=found,
        order="fastest" if arguments.search else "nearest",
    )  # fmt: skip


def ask_of(recipe: Recipe, layout: Layout, *, shapes: Sequence[str], num_clips: int) -> Ask:
    """A recipe that `wan-accel check` finds no problem in, on a layout.

    Raises:
        ValueError: every problem at once.
    """
    variant = get_variant(recipe.variant)
    tensors = open_shapes(recipe, variant)
    problems = check(
        recipe, world_size=layout.world_size, engine=layout.engine, offload=layout.offload, num_heads=tensors.num_heads
    )
    if problems:
        raise ValueError("\n".join([f"{len(problems)} problems in the recipe:", *problems]))
    clips = find_clips(recipe.data, variant, [parse_shape(shape) for shape in shapes], num_clips)
    return Ask(recipe=recipe, layout=layout, shapes=tensors, clips=clips)


def _gpus(arguments: argparse.Namespace) -> tuple[list[Gpu], Budget]:
    """Rows of the table, and the memory that is asked about."""
    if arguments.gpu_memory is None and arguments.gpu is None:
        raise ValueError("how much memory a GPU has is not given: --gpu_memory 80GiB, or --gpu H100")
    if not 0 <= arguments.reserve < 1:
        raise ValueError(f"--reserve {arguments.reserve}: a share of the memory, e.g. 0.06")
    table = read_gpus(arguments.gpus)
    memory = None if arguments.gpu_memory is None else parse_memory(arguments.gpu_memory)
    gpus = chosen_gpus(table, name=arguments.gpu, memory_gib=None if memory is None else memory / GIB)
    return gpus, Budget(memory=memory or gpus[0].memory_gib * GIB, reserve=arguments.reserve)
