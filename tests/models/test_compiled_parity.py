"""Compiled denoisers against diffsynth's functional forward, which is eager: outputs, all gradients, no breaks."""

import copy

import pytest
import torch
from models.test_recompute import BACKEND, apply
from models.test_variant_parity import ADAPTER, architectures, diffsynth_velocity, inputs_of
from oracle import assert_same_gradients, precise, randomise
from torch._dynamo.utils import counters

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_animate_adapter, build_dit

T2V = next(names for names in architectures() if "t2v-1.3b" in names)


def assert_equals_diffsynth(names: str, backend: str, batch: int, policy: str | float = "attention") -> float:
    """Compare a compiled denoiser with diffsynth's; by default it keeps attention's outputs, as shipped recipes do.

    Returns:
        Linear layers of a block's forward, on average, that its backward ran again. All of them have a bias, which none
        of backward's own products has.
    """
    size, conditioning = architectures()[names]
    modules = [build_dit(size)] + ([build_animate_adapter(ADAPTER)] if "pose" in conditioning else [])
    for seed, module in enumerate(modules):
        randomise(module, seed)
    oracle = [precise(copy.deepcopy(module)) for module in modules]
    denoiser = WanDenoiser(*modules, with_motion_encoder=True)
    counters.clear()
    apply(denoiser, policy, backend)
    inputs = inputs_of(size, conditioning, batch, torch.float32)
    out = denoiser(**inputs)
    expected = diffsynth_velocity(oracle[0], oracle[1] if len(oracle) > 1 else None, **inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (out * weights).mean().backward()
    (expected * weights).mean().backward()
    assert_same_gradients(denoiser, oracle, 1e-5)
    # One graph for each kind of block, and one for the first block if its input needs no gradient.
    assert counters["stats"]["unique_graphs"] == len(modules) and not counters["graph_break"]
    linears = sum(event.count for event in profile.key_averages() if event.key == "aten::addmm")
    return linears / len(denoiser.transformer_blocks)


@pytest.mark.parametrize("names", architectures())
def test_compiled_blocks_equal_diffsynth(names: str) -> None:
    """Three samples with timesteps of their own; of ti2v some with a clean first frame and some without."""
    assert_equals_diffsynth(names, BACKEND, batch=3)


@pytest.mark.parametrize(("policy", "fewest", "most"), [("full", 10, 10), (0.5, 1, 5), ("none", 0, 0)])
def test_other_policies_equal_diffsynth(policy: str | float, fewest: int, most: int) -> None:
    """And run again what they say of a block's ten linears: all, some under a budget of half the memory, none."""
    again = assert_equals_diffsynth(T2V, BACKEND, batch=1, policy=policy)
    assert fewest <= again <= most


def test_inductor_equals_diffsynth_and_a_restart_reads_its_cache() -> None:
    """Inductor's own C++ (its Triton on a GPU), and no tracing of forward and backward in the next start.

    A minute where inductor's cache on disk is empty.
    """
    assert_equals_diffsynth(T2V, "inductor", batch=1)
    first = dict(counters["aot_autograd"])
    assert first.get("autograd_cache_saved") or first.get("autograd_cache_hit"), first
    assert_equals_diffsynth(T2V, "inductor", batch=1)
    again = dict(counters["aot_autograd"])
    assert again.get("autograd_cache_hit") == 1 and "autograd_cache_bypass" not in again, again
