"""Policies of recomputation: equal results, and nothing run twice that a policy keeps; eager and compiled."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from synthetic import tiny_denoiser
from torch.utils._python_dispatch import TorchDispatchMode

from wan_accel.lora import LoraSettings, inject_lora, is_lora
from wan_accel.models.blocks import CheckpointedModule
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import WanDenoiser, inject_ulysses
from wan_accel.models.recompute import SAVED_OPERATORS, is_saved, recompute_of
from wan_accel.models.variants import VARIANTS

# Traces, differentiates and partitions like inductor, without building C++.
BACKEND = "aot_eager_decomp_partition"
POLICIES = ["full", "attention", 0.3, "none"]


class Dispatched(TorchDispatchMode):
    """Counts the operators that a policy keeps, those of backward aside. Selective checkpointing's modes lie above:
    what they give from their store does not arrive here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_saved(func):
            name = func.name().split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class Profiled:
    """The same for compiled code, which refuses dispatch modes."""

    def __enter__(self) -> "Profiled":
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = self.profile.key_averages()
        self.counts = {event.key: event.count for event in events if event.key in SAVED_OPERATORS}


def counting(backend: str | None) -> Any:
    return Dispatched() if backend is None else Profiled()


def apply(model: WanDenoiser, policy: str | float, backend: str | None, num_shapes: int = 1) -> None:
    recompute = recompute_of(policy)
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpointing, module.contexts = recompute.checkpointing, recompute.contexts
    if backend is not None:
        torch._dynamo.reset()
        compile_blocks(model, num_shapes=num_shapes, budget=recompute.budget, backend=backend)


def inputs_of(variant: str, batch: int = 2, frames: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {
        "hidden_states": rand(16, frames, 4, 6),
        "timestep": torch.tensor([321.7, 950.3, 20.0])[:batch],
        "text": rand(16, 24),
    }
    if VARIANTS[variant].has_animate_adapter:
        inputs |= {
            "condition": rand(20, frames, 4, 6), "clip_features": rand(257, 40),
            "pose_latents": rand(16, frames - 1, 4, 6), "motion_vectors": rand(4 * frames - 7, 16),
        }  # fmt: skip
    return inputs


def results(model: WanDenoiser, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_results(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5 * float(expected[0].abs().max()))
    assert found[1].keys() == expected[1].keys()
    largest = max(float(grad.norm()) for grad in expected[1].values())
    for name, grad in found[1].items():
        bound = 1e-5 * max(float(expected[1][name].norm()), 1e-2 * largest)
        assert float((grad - expected[1][name]).norm()) <= bound, name


def adapted(variant: str, method: str) -> WanDenoiser:
    model = tiny_denoiser(variant)
    if method == "lora":
        inject_lora(model, LoraSettings(r=4, lora_alpha=8.0), VARIANTS[variant])
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize(
    ("variant", "method", "compiled"),
    [
        ("t2v-1.3b", "full", POLICIES),
        ("animate-14b", "lora", POLICIES),
        ("t2v-1.3b", "lora", ["attention"]),  # compiling takes seconds a policy
        ("animate-14b", "full", ["attention"]),
    ],
)
def test_every_policy_computes_the_same_eager_and_compiled(
    variant: str, method: str, compiled: list[str | float]
) -> None:
    model, inputs = adapted(variant, method), inputs_of(variant)
    names = list(model.state_dict())
    expected = results(model, inputs)
    for policy in POLICIES:
        if isinstance(policy, str):
            apply(model, policy, None)
            assert_equal_results(results(model, inputs), expected)
        if policy in compiled:
            apply(model, policy, BACKEND)
            assert_equal_results(results(model, inputs), expected)
        assert list(model.state_dict()) == names
        for block in model.modules():
            if isinstance(block, CheckpointedModule):
                block.compiled = None


def test_inductor_computes_the_same() -> None:
    """The compiler of a real run, on the default policy; parity of the eager model is in test_denoiser."""
    model, inputs = adapted("t2v-1.3b", "full"), inputs_of("t2v-1.3b")
    expected = results(model, inputs)
    apply(model, "attention", "inductor")
    assert_equal_results(results(model, inputs), expected)


@pytest.mark.parametrize(("policy", "again"), [("full", True), ("attention", False), (0.05, False), (0.9, False)])
@pytest.mark.parametrize("backend", [None, BACKEND])
def test_attention_runs_once(policy: str | float, again: bool, backend: str | None) -> None:
    if backend is None and isinstance(policy, float):
        return  # a budget belongs to the compiler; check refuses it without
    model, inputs = tiny_denoiser("t2v-1.3b"), inputs_of("t2v-1.3b")
    apply(model, policy, backend)
    model(**inputs).square().mean().backward()  # compiles outside of the counting
    with counting(backend) as forward:
        out = model(**inputs)
    with counting(backend) as backward:
        out.square().mean().backward()
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert forward.counts == {attention: 4}  # two blocks: self and cross attention
    assert backward.counts == ({attention: 4} if again else {})


def exchanges(policy: str | float, backend: str | None) -> tuple[dict[str, int], float]:
    """What is run, and what a block keeps, in units of its input."""
    dist.init_process_group("gloo")
    model, inputs = tiny_denoiser("t2v-1.3b"), inputs_of("t2v-1.3b")
    inject_ulysses(model, dist.group.WORLD)
    apply(model, policy, backend)
    model(**inputs).square().mean().backward()
    with counting(backend) as counter:
        model(**inputs).square().mean().backward()
    return counter.counts, kept_units(model, inputs)


def kept_units(model: WanDenoiser, inputs: dict[str, torch.Tensor]) -> float:
    """Elements that the last block keeps for its backward in tensors with all of a rank's tokens, over its input's."""
    block, kept = model.transformer_blocks[-1], {}
    forward, unit = block.forward, 0

    def watched(x: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal unit
        unit = x.numel()

        def pack(saved: torch.Tensor) -> torch.Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() / saved.element_size()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            return forward(x, *args)

    block.forward = watched  # type: ignore[method-assign]
    model(**inputs).square().mean().backward()
    return sum(size for size in kept.values() if size % unit == 0) / unit


@pytest.mark.parametrize(("policy", "backend"), [("attention", None), ("attention", BACKEND), (0.05, BACKEND)])
def test_exchanges_run_once(policy: str | float, backend: str | None) -> None:
    """Two exchanges a block forward and two backward; a third pair would be a recomputed one.

    Kept are input, both attentions' outputs, and of the exchanges q, k, v and output (docs/TRAINING.md: 7 units). In
    an eager block selective checkpointing keeps them where hooks do not see them.
    """
    for counts, kept in run_ranks(exchanges, 2, policy, backend):
        assert counts == {"wan_accel::exchange_chunks": 8, "aten::_scaled_dot_product_flash_attention_for_cpu": 4}
        assert kept == 7 or backend is None or policy != "attention"


def test_more_shapes_than_planned_fail_loudly() -> None:
    model = tiny_denoiser("t2v-1.3b")
    apply(model, "attention", "eager", num_shapes=1)
    with pytest.raises(RuntimeError, match="more kinds than the 1 shapes of the step plan"):
        for frames in range(2, 9):
            model(**inputs_of("t2v-1.3b", frames=frames)).sum().backward()
    model.zero_grad()
    with torch.no_grad():  # validation and sampling are not compiled
        model(**inputs_of("t2v-1.3b", frames=9))


def test_blocks_share_a_graph_and_shapes_have_one_each() -> None:
    model = tiny_denoiser("animate-14b")
    apply(model, "attention", "eager", num_shapes=2)
    torch._dynamo.utils.counters.clear()
    for frames in (2, 3, 2, 3):
        model(**inputs_of("animate-14b", frames=frames)).sum().backward()
    # Two shapes of two kinds of blocks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_budgets_outside_the_range() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing=1\.5: a budget lies between 0 and 1"):
        recompute_of(1.5)
