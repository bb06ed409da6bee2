"""Other layouts of the same job: which there are, which fit, and which of those is nearest or fastest."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from wan_accel.models.recompute import Policy
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.names import Offload
from wan_accel.plan.ask import Ask
from wan_accel.plan.estimate import Estimate, Planner
from wan_accel.plan.layout import Layout
from wan_accel.plan.verdict import Budget
from wan_accel.recipe.check import check
from wan_accel.recipe.schema import Recipe

NUM_SHOWN = 3
# How many times as many GPUs are tried where no layout of the given ones fits.
MORE_GPUS = (2, 4, 8)
# What the changes of a layout weigh: others of a recipe's line weigh 1.
_ENGINE, _DOUBLING_GPUS = 3, 2
Order = Literal["nearest", "fastest"]
_FSDP_OFFLOAD: tuple[Offload, ...] = ("none", "parameters")
_ZERO_OFFLOAD: dict[Literal["zero2", "zero3"], tuple[Offload, ...]] = {
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "parameters"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A layout that was looked at. changes: from the one that was asked about, as one would write them."""

    estimate: Estimate
    changes: tuple[str, ...]
    distance: float

    @property
    def cost(self) -> float:
        """Seconds of an optimizer step on the first GPU that there are times for; bytes where there is none."""
        times = self.estimate.times
        return times[0].seconds if times else self.estimate.peak.total


def search(planner: Planner, asked: Estimate, budget: Budget) -> list[Found]:
    """The fastest layouts that fit on as many GPUs, the asked one among them, the best simulated: they fit so too."""
    found = fitting(planner, asked.ask, budget, asked.ask.layout.world_size)
    if budget.holds(asked.peak.total):
        found.append(Found(estimate=asked, changes=("as asked",), distance=0))
    checked: list[Found] = []
    for one in sorted(found, key=lambda one: one.cost):
        if one.estimate.ask.layout.can_be_simulated and one.estimate.method != "simulated":
            one = replace(one, estimate=planner.by_simulation(one.estimate.ask))
        if budget.holds(one.estimate.peak.total):
            checked.append(one)
        if len(checked) == NUM_SHOWN:
            break
    return checked


def nearest(planner: Planner, ask: Ask, budget: Budget) -> list[Found]:
    """The layouts that fit with the least change, by formula: on as many GPUs, or on more where there is none."""
    for factor in (1, *MORE_GPUS):
        found = fitting(planner, ask, budget, factor * ask.layout.world_size)
        if found:
            return sorted(found, key=lambda one: (one.distance, one.cost))[:NUM_SHOWN]
    return []


def fitting(planner: Planner, ask: Ask, budget: Budget, world_size: int) -> list[Found]:
    """Every other layout of `world_size` GPUs that fits by formula."""
    found = []
    for recipe, layout in alternatives(ask, world_size):
        estimate = planner.by_formula(ask.on(layout, recipe))
        if budget.holds(estimate.peak.total):
            changes, distance = difference(ask, recipe, layout)
            found.append(Found(estimate=estimate, changes=changes, distance=distance))
    return found


def alternatives(ask: Ask, world_size: int) -> Iterator[tuple[Recipe, Layout]]:
    """Mesh x recomputation x offloading, as far as `wan-accel check` takes them; the asked one is left out."""
    policies: list[Policy | float] = list(dict.fromkeys([ask.techniques.activation_checkpointing, *get_args(Policy)]))
    for layout in _layouts(ask, world_size):
        for policy in policies:
            recipe = _recipe(ask.recipe, policy, layout)
            if (recipe, layout) == (ask.recipe, ask.layout):
                continue
            heads = ask.size.num_heads
            if not check(
                recipe, world_size=world_size, engine=layout.engine, offload=layout.offload, num_heads=heads
            ):
                yield recipe, layout


def _recipe(recipe: Recipe, policy: Policy | float, layout: Layout) -> Recipe:
    """ZeRO-3 cannot have compiled blocks."""
    compiled = recipe.memory.compile and layout.engine != "zero3"
    return replace(
        recipe,
        parallel=replace(recipe.parallel, ulysses=layout.ulysses),
        memory=replace(recipe.memory, activation_checkpointing=policy, compile=compiled),
    )


def _layouts(ask: Ask, world_size: int) -> Iterator[Layout]:
    degrees = [degree for degree in usable_degrees(ask.size.num_heads) if world_size % degree == 0]
    for degree in degrees:
        asked = replace(ask.layout, ulysses=degree, world_size=world_size)
        if world_size == 1:
            yield asked
            continue
        if ask.layout.engine == "ddp":
            yield asked
        for replicas in (1, 2, 4, 8):
            if world_size % replicas == 0 and world_size // replicas > 1 and world_size // replicas % degree == 0:
                engine: Literal["fsdp2", "hsdp"] = "fsdp2" if replicas == 1 else "hsdp"
                for offload in _FSDP_OFFLOAD:
                    yield replace(asked, engine=engine, dp_replicate=replicas, offload=offload)
        for zero, offloads in _ZERO_OFFLOAD.items():
            for offload in offloads:
                yield replace(asked, engine=zero, dp_replicate=1, offload=offload, reshard_after_forward=True)


def difference(ask: Ask, recipe: Recipe, layout: Layout) -> tuple[tuple[str, ...], float]:
    """What a layout changes of the asked one, in the words of recipe and accelerate config; and how much that is."""
    old, changes, distance = ask.layout, [], 0.0
    if layout.world_size != old.world_size:
        changes.append(f"--num_processes {layout.world_size}")
        distance += _DOUBLING_GPUS * abs(math.log2(layout.world_size / old.world_size))
    if (layout.engine, layout.dp_replicate) != (old.engine, old.dp_replicate):
        replicas = f" ({layout.dp_replicate} replicas)" if layout.dp_replicate > 1 else ""
        changes.append(f"{layout.engine}.yaml{replicas}")
        distance += 1 if layout.is_sharded and old.is_sharded else _ENGINE
    if layout.offload != old.offload:
        parts = {"none": "none", "optimizer": "optimizer", "parameters": "optimizer and param"}
        all_of_it = "fsdp_offload_params: true" if layout.is_sharded and layout.offload != "none" else ""
        changes.append(all_of_it or f"offload to cpu: {parts[layout.offload]}")
        distance += 1 + (layout.offload == "parameters")
    if layout.ulysses != old.ulysses:
        changes.append(f"parallel.ulysses={layout.ulysses}")
        distance += abs(math.log2(layout.ulysses / old.ulysses))
    for name in ("activation_checkpointing", "compile"):
        if (value := getattr(recipe.memory, name)) != getattr(ask.recipe.memory, name):
            changes.append(f"memory.{name}={str(value).lower()}")
            distance += 1
    return tuple(changes), distance
