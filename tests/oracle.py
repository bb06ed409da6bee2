"""Comparing a denoiser with diffsynth's own functional forward: weights, precision, gradients."""

import torch
from diffsynth.models.wan_video_dit import set_to_torch_norm


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: the default initialisation leaves norms and biases at values that hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.endswith(".kernel"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)


def precise(module: torch.nn.Module) -> torch.nn.Module:
    """Let diffsynth's own RMSNorm follow the inputs' dtype: its default casts fp64 down to fp32."""
    set_to_torch_norm([module])
    return module


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_gradients(ours: torch.nn.Module, theirs: list[torch.nn.Module], tolerance: float) -> None:
    """Every gradient by norm; below 1e-2 of the largest gradient, against that.

    In fp32 the small gradients of queries and keys are differences of large terms: two orders of the same sums
    give 2e-5 of their own norm. The fp64 runs have no such excuse and show the formulae to be the same.
    """
    expected = {name: grad for module in theirs for name, grad in gradients(module).items()}
    found = gradients(ours)
    assert found.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in found.items():
        if name.endswith(".kernel"):
            assert grad is None
            continue
        assert grad is not None and expected[name] is not None, name
        bound = tolerance * max(float(expected[name].norm()), 1e-2 * largest)
        assert float((grad - expected[name]).norm()) <= bound, name
