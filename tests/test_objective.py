"""Flow matching against closed forms."""

import numpy as np
import pytest
import torch

from wan_accel.models.variants import VARIANTS
from wan_accel.objective import (
    NoiseLevels,
    add_noise,
    loss_weight,
    per_sample_mse,
    shift_sigma,
    step_loss,
    velocity,
)

DENSITIES = ["uniform", "logit_normal", "mode"]


def test_interpolation_and_velocity() -> None:
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    sigma = torch.tensor([0.0, 0.25])
    noisy = add_noise(latents, noise, sigma)
    assert torch.equal(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    # The velocity is d x_t / d sigma, so it leads from x_t to both ends.
    step = velocity(latents, noise)
    torch.testing.assert_close(noisy[1] + 0.75 * step[1], noise[1])
    torch.testing.assert_close(noisy[1] - 0.25 * step[1], latents[1])


def test_step_loss_is_the_mean_on_any_layout() -> None:
    losses, weight = torch.rand(12), torch.rand(12)
    expected = (losses * weight).sum() / 12
    for ranks in (1, 2, 3, 4):
        shares = [step_loss(losses[r::ranks], weight[r::ranks], 12, ranks) for r in range(ranks)]
        torch.testing.assert_close(torch.stack(shares).mean(), expected)


def test_per_sample_mse_is_fp32() -> None:
    predicted = torch.full((2, 100), 1.0, dtype=torch.bfloat16)
    assert torch.equal(per_sample_mse(predicted, torch.zeros(2, 100)), torch.ones(2))


def test_bell_weights() -> None:
    """Values of DiffSynth's training_weight: 0 at t = 1000, .32 at 950, .63 at 900, 2.08 at 500, .64 at 100."""
    sigma = torch.tensor([1.0, 0.95, 0.9, 0.5, 0.1])
    weights = loss_weight(sigma, "bell").tolist()
    assert weights == pytest.approx([0.0, 0.319, 0.631, 2.076, 0.631], abs=1e-3)
    grid = np.linspace(1.0, 0.0, 1001)[:-1]
    timesteps = torch.from_numpy(5 * grid / (1 + 4 * grid))
    assert loss_weight(timesteps, "bell").mean().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(loss_weight(sigma, "none"), torch.ones(5))


@pytest.mark.parametrize("density", DENSITIES)
def test_quantile_and_its_inverse(density: str) -> None:
    levels = NoiseLevels(density=density, shift=5.0)
    values = [levels.quantile(u) for u in np.linspace(0.001, 0.999, 200)]
    assert all(before < after for before, after in zip(values, values[1:]))
    for u in (0.05, 0.3, 0.5, 0.9):
        assert levels.share_below(levels.quantile(u)) == pytest.approx(u, abs=1e-6)
    assert (levels.share_below(0.0), levels.share_below(1.0)) == (0.0, 1.0)


def test_densities_have_their_shape() -> None:
    assert shift_sigma(0.5, 5.0) == pytest.approx(5 / 6)
    assert NoiseLevels(shift=5.0).quantile(0.5) == pytest.approx(5 / 6)  # median t = 833, as in DiffSynth
    assert NoiseLevels(density="logit_normal", shift=1.0).quantile(0.5) == pytest.approx(0.5)
    logit = NoiseLevels(density="logit_normal", shift=1.0, logit_mean=1.0, logit_std=0.5)
    assert logit.quantile(0.8413447) == pytest.approx(1 / (1 + np.exp(-1.5)), abs=1e-6)
    assert NoiseLevels(density="mode", shift=1.0, mode_scale=0.0).quantile(0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("expert", VARIANTS["i2v-a14b"].experts, ids=lambda expert: expert.name)
def test_draws_of_an_expert_are_conditional(density: str, expert: object) -> None:
    whole = NoiseLevels(density=density, shift=5.0)
    part = NoiseLevels(density=density, shift=5.0, sigma_min=expert.sigma_min, sigma_max=expert.sigma_max)
    drawn = [part.sample(u) for u in np.linspace(0, 1, 500, endpoint=False)]
    assert expert.sigma_min <= min(drawn) and max(drawn) <= expert.sigma_max
    middle = (expert.sigma_min + expert.sigma_max) / 2
    low, high = whole.share_below(expert.sigma_min), whole.share_below(expert.sigma_max)
    expected = (whole.share_below(middle) - low) / (high - low)
    assert np.mean([sigma < middle for sigma in drawn]) == pytest.approx(expected, abs=0.01)
