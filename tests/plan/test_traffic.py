"""Collectives that real ranks call in a training step, eager and compiled: those of the formula."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from parallel import layouts
from parallel.test_equivalence import make_trainer, tiny_model
from ranks import run_ranks

from wan_accel.models.attention import ATTENTION_BACKENDS
from wan_accel.models.dit import dit_size_from_shapes
from wan_accel.models.recompute import Policy
from wan_accel.parallel.ulysses import SequenceParallel, UlyssesAttention
from wan_accel.plan.collectives import CountCollectives, Traffic
from wan_accel.plan.layout import Layout
from wan_accel.plan.simulate import axes_of, fake_ranks
from wan_accel.plan.traffic import micro_step_traffic
from wan_accel.plan.weights import units_of

# Traces, differentiates and partitions like inductor, whose C++ would take a minute to build here.
BACKEND = "aot_eager_decomp_partition"
# DeepSpeed keeps small parameters gathered, and all that fits its limits until the backward pass. Of a model that is
# far beyond these, as the formula takes it to be, it keeps nothing.
LIKE_A_LARGE_MODEL = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


class Case(NamedTuple):
    """What is trained, and how its blocks run."""

    variant: str
    method: str
    policy: Policy
    is_compiled: bool


class MicroStep(NamedTuple):
    """A micro-step of a rank: (B, C, F, h, w) of its latents, and its collectives."""

    shape: tuple[int, ...]
    traffic: list[Traffic]


def counted(cases: Sequence[Case], ulysses: int, output_dir: str, options: dict[str, Any]) -> list[list[MicroStep]]:
    """The micro-steps of the first optimizer step, of each case in turn."""
    return [_count(case, ulysses, output_dir, options) for case in cases]


def _count(case: Case, ulysses: int, output_dir: str, options: dict[str, Any]) -> list[MicroStep]:
    torch._dynamo.reset()  # a graph of the case before would be taken for this one's
    compiled = {"backend": BACKEND} if case.is_compiled else {}
    how = options | compiled | {"policy": case.policy, "arguments": {"max_steps": 1}}
    trainer = make_trainer(case.variant, case.method, ulysses, output_dir, how)
    axes = axes_of(trainer.module, trainer.dims.shard_mesh("cpu"))
    if trainer.engine == "zero3":
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= LIKE_A_LARGE_MODEL
    if trainer.engine == "ddp":
        axes[dist.group.WORLD.group_name] = "dp_replicate"  # type: ignore[union-attr]
    found: list[MicroStep] = []
    run = trainer._micro_step

    def micro_step(expert: str, batch: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        with CountCollectives(axes) as counter:
            loss = run(expert, batch, *args, **kwargs)
        found.append(MicroStep(tuple(batch["latents"].shape), counter.traffic))
        return loss

    trainer._micro_step = micro_step
    trainer.train()
    return found


def by_formula(case: Case, layout: Layout, shape: Sequence[int]) -> list[Traffic]:
    """What `wan-accel plan` says of a micro-step on latents of that shape."""
    model, _ = tiny_model(case.variant, case.method)
    shapes = {name.replace(".base_layer.", "."): tuple(value.shape) for name, value in model.named_parameters()}
    size = dit_size_from_shapes(shapes, num_heads=model.num_heads)
    num_samples, _, *grid = shape
    num_tokens = grid[0] * (grid[1] // size.patch_size[1]) * (grid[2] // size.patch_size[2])
    found = micro_step_traffic(
        units_of(model), layout, size, num_samples=num_samples, num_tokens=num_tokens, policy=case.policy
    )  # fmt: skip
    return sorted(found, key=lambda one: (one.axis, one.kind))


def run(engine: str, ulysses: int, cases: Sequence[Case], folder: Path) -> tuple[Layout, list[list[MicroStep]]]:
    """A layout as the plan describes it, and what its ranks, which all call the same, have called."""
    row = layouts.Layout(engine=engine, ulysses=ulysses)
    options = {"world_size": row.num_ranks, "engine": engine}
    ranks = run_ranks(
        counted, row.num_ranks, cases, ulysses, str(folder), options, engine=engine, timeout_seconds=600
    )  # fmt: skip
    assert all(rank == ranks[0] for rank in ranks[1:])
    layout = Layout(
        engine=engine,  # type: ignore[arg-type]
        world_size=row.num_ranks, ulysses=ulysses, dp_replicate=2 if engine == "hsdp" else 1, is_mixed=False,
    )  # fmt: skip
    return layout, ranks[0]


CASES = {
    ("fsdp2", 1): [Case("t2v-1.3b", "full", "none", False), Case("t2v-1.3b", "full", "none", True)],
    ("fsdp2", 2): [
        Case("t2v-1.3b", "full", "full", False),
        Case("t2v-1.3b", "full", "full", True),
        Case("t2v-1.3b", "full", "attention", False),
        Case("t2v-1.3b", "full", "attention", True),
        Case("ti2v-5b", "full", "none", False),
        Case("animate-14b", "lora", "attention", False),
        Case("animate-14b", "lora", "attention", True),
    ],
    ("hsdp", 2): [Case("t2v-1.3b", "full", "attention", False), Case("t2v-1.3b", "full", "attention", True)],
}


@pytest.mark.parametrize(("engine", "ulysses"), CASES)
def test_sharded_ranks_call_what_the_formula_says(engine: str, ulysses: int, tmp_path: Path) -> None:
    layout, found = run(engine, ulysses, CASES[engine, ulysses], tmp_path)
    exchanges: dict[tuple[str, bool], int | None] = {}
    for case, micro_steps in zip(CASES[engine, ulysses], found, strict=True):
        assert len(micro_steps) >= 3 and len({micro.shape for micro in micro_steps}) == 2
        for micro in micro_steps:
            assert micro.traffic == by_formula(case, layout, micro.shape), case
        calls = {one.kind: one.calls for one in micro_steps[0].traffic}
        if case.variant == "t2v-1.3b" and ulysses > 1:
            exchanges[case.policy, case.is_compiled] = calls["all-to-all"]
    if (engine, ulysses) == ("fsdp2", 2):
        # Of two blocks. Were exchanges inside a compiled graph not seen, or those run again, these would be less.
        assert exchanges == {
            ("full", False): 12, ("full", True): 12, ("attention", False): 8, ("attention", True): 8,
        }  # fmt: skip


def test_ddp_reduces_what_the_formula_says_once_a_step(tmp_path: Path) -> None:
    cases = [Case("t2v-1.3b", "full", "attention", False), Case("t2v-1.3b", "full", "attention", True)]
    layout, found = run("ddp", 2, cases, tmp_path)
    for case, micro_steps in zip(cases, found, strict=True):
        *before, last = micro_steps
        for micro in before:
            expected = by_formula(case, layout, micro.shape)
            assert micro.traffic == [one for one in expected if one.kind != "all-reduce"]
        # The buckets, which decide on calls, are DDP's own.
        assert [replace(one, calls=None) if one.kind == "all-reduce" else one for one in last.traffic] == by_formula(
            case, layout, last.shape
        )


def test_zero_gathers_and_reduces_what_the_formula_says(tmp_path: Path) -> None:
    cases = [Case("t2v-1.3b", "full", "none", False)]
    layout, (micro_steps,) = run("zero3", 2, cases, tmp_path)
    for micro in micro_steps:
        # Calls are left to DeepSpeed. Its all-reduces are of the norm, for clipping.
        of_shards = [replace(one, calls=None) for one in micro.traffic if one.axis == "dp_shard"]
        exchanges = [one for one in micro.traffic if one.axis == "ulysses"]
        assert [*(one for one in of_shards if one.kind != "all-reduce"), *exchanges] == by_formula(
            cases[0], layout, micro.shape
        )
        assert sum(one.bytes for one in of_shards if one.kind == "all-reduce") <= 16


def test_q_k_and_v_travel_together() -> None:
    """One exchange of three tensors, one of attention's output."""
    with fake_ranks(4):
        assert dist.group.WORLD is not None
        parallel = SequenceParallel(dist.group.WORLD)
        attention = UlyssesAttention(ATTENTION_BACKENDS["sdpa"].processor(2), parallel, num_heads=8)
        attention.num_tokens = 18
        q, k, v = torch.randn(3, 2, 5, 96)  # (B, l, H*D)
        with CountCollectives({parallel.group_name: "ulysses"}) as counter:
            attention(q, k, v)
    (one,) = counter.traffic
    assert (one.kind, one.calls, one.bytes) == ("all-to-all", 2, 4 * q.nbytes)
