"""Before a run reads its weights: whether it fits the GPUs that it is on, by formula (`plan.on_misfit`)."""

import logging
import os
from collections import Counter
from collections.abc import Sequence

import torch

from wan_accel.draws import Bucket
from wan_accel.models.reader import TensorShapes
from wan_accel.parallel.agreement import from_main_rank
from wan_accel.parallel.engine import launched_engine, launched_offload
from wan_accel.parallel.plugins import launched_fsdp2
from wan_accel.parallel.replicas import launched_replicas
from wan_accel.plan.layout import Layout, PlannedEngine
from wan_accel.plan.verdict import Budget
from wan_accel.recipe.schema import OnMisfit, Recipe

logger = logging.getLogger("wan_accel")


def check_fit(
    recipe: Recipe, on_misfit: OnMisfit, *, shapes: TensorShapes, buckets: Sequence[Bucket], device: torch.device
) -> None:
    """Compare what a run needs with the memory of the main rank's GPU; nothing without one. Collective.

    Args:
        recipe: a checked recipe.
        on_misfit: what to do where it does not fit.
        shapes: of the model's tensors.
        buckets: of the rows that are trained on.
        device: of this rank.

    Raises:
        ValueError: it does not fit, and `on_misfit` is `error`; on all ranks.
    """
    memory = gpu_memory(device)
    if memory is None:
        return
    layout = launched_layout(recipe.parallel.ulysses)
    from_main_rank(lambda: _compare(recipe, on_misfit, layout, shapes, Counter(buckets), Budget(memory=memory)))


def _compare(
    recipe: Recipe, on_misfit: OnMisfit, layout: Layout, shapes: TensorShapes, clips: Counter[Bucket], budget: Budget
) -> None:
    from wan_accel.plan.ask import Ask  # the compiler's parts among them take a second to load
    from wan_accel.plan.estimate import Planner

    ask = Ask(recipe=recipe, layout=layout, shapes=shapes, clips=clips)
    peak = Planner(ask, ()).by_formula(ask).peak
    torch._dynamo.reset()  # the run compiles its own blocks
    verdict = f"{budget.verdict(peak.total)}, by formula ({peak.moment}; {layout.describe()})"
    if budget.holds(peak.total):
        logger.info("the plan: %s", verdict)
        return
    advice = "`wan-accel plan RECIPE --config_file CONFIG` names layouts that would"
    if on_misfit == "error":
        raise ValueError(f"plan.on_misfit: {verdict}: {advice}; or set plan.on_misfit: warn")
    logger.warning("the plan: %s: %s", verdict, advice)


def gpu_memory(device: torch.device) -> int | None:
    """All of a GPU's memory in bytes, None for other devices."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def launched_layout(ulysses: int) -> Layout:
    """The layout that the launcher has put into the environment."""
    replicas = launched_replicas()
    found = launched_engine()
    engine: PlannedEngine = "hsdp" if found == "fsdp2" and replicas > 1 else found
    return Layout(
        engine=engine,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        ulysses=ulysses,
        dp_replicate=replicas if engine == "hsdp" else 1,
        is_mixed=os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16",
        reshard_after_forward=bool(launched_fsdp2().reshard_after_forward) if found == "fsdp2" else True,
        offload=launched_offload(),
    )
