"""Flow matching: noise levels, interpolation, target, weighting and the loss. Pure functions.

Convention: sigma in [0, 1], 0 is data and 1 is noise; timestep = 1000 * sigma.
    x_t = (1 - sigma) * x_0 + sigma * noise;  velocity = noise - x_0
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # the densities are used without torch (step plan, recipe checks)
    from torch import Tensor

Density = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["none", "bell"]
NUM_TRAIN_TIMESTEPS = 1000
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseLevels:
    """The distribution that a training sample's sigma is drawn from, before and after the shift.

    density: `uniform`; `logit_normal` with `logit_mean` and `logit_std`; `mode` with `mode_scale`
        (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1).
    shift: sigma' = shift * sigma / (1 + (shift - 1) * sigma), as Wan samples.
    sigma_min, sigma_max: the range of one expert; draws are conditional on it.
    """

    density: Density = "uniform"
    shift: float = 5.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    sigma_min: float = 0.0
    sigma_max: float = 1.0

    def quantile(self, u: float) -> float:
        """The sigma below which a share u in [0, 1] of the draws lies, over the whole range."""
        if self.density == "logit_normal":
            z = self.logit_mean + self.logit_std * _NORMAL.inv_cdf(min(max(u, 1e-12), 1 - 1e-12))
            u = 1 / (1 + math.exp(-z))
        elif self.density == "mode":
            v = 1 - u  # the published formula falls in u; this one rises
            u = 1 - v - self.mode_scale * (math.cos(math.pi * v / 2) ** 2 - 1 + v)
        return shift_sigma(u, self.shift)

    def share_below(self, sigma: float) -> float:
        """The share of draws below sigma: the inverse of `quantile`, by bisection to 1e-12."""
        low, high = 0.0, 1.0
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (middle, high) if self.quantile(middle) < sigma else (low, middle)
        return 0.0 if sigma <= 0 else 1.0 if sigma >= 1 else (low + high) / 2

    def sample(self, u: float) -> float:
        """Map a uniform u in [0, 1) to a sigma inside [sigma_min, sigma_max]."""
        low, high = _bounds(self)
        sigma = self.quantile(low + u * (high - low))
        return min(max(sigma, self.sigma_min), self.sigma_max)


@lru_cache(maxsize=64)
def _bounds(levels: NoiseLevels) -> tuple[float, float]:
    return levels.share_below(levels.sigma_min), levels.share_below(levels.sigma_max)


def shift_sigma(sigma: float, shift: float) -> float:
    """shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(latents: "Tensor", noise: "Tensor", sigma: "Tensor") -> "Tensor":
    """x_t of latents (B, ...) and noise of the same shape at sigma (B,)."""
    sigma = _per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: "Tensor", noise: "Tensor") -> "Tensor":
    """The target noise - x_0."""
    return noise - latents


def _per_sample(value: "Tensor", like: "Tensor") -> "Tensor":
    return value.view(-1, *[1] * (like.ndim - 1))


def per_sample_mse(predicted: "Tensor", target: "Tensor", mask: "Tensor | None" = None) -> "Tensor":
    """Mean squared error over a sample's elements, fp32: (B, ...) -> (B,).

    Args:
        predicted, target: (B, ...).
        mask: bool, broadcasts to them; the mean is over the elements where it is True.
    """
    squared = (predicted.float() - target.float()).square()
    if mask is None:
        return squared.flatten(1).mean(1)
    mask = mask.expand_as(squared)
    return (squared * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@lru_cache(maxsize=8)
def _bell_constants(shift: float) -> tuple[float, float]:
    """Minimum and mean of the bell over DiffSynth's 1000 training timesteps."""
    sigmas = np.linspace(1.0, 0.0, NUM_TRAIN_TIMESTEPS + 1)[:-1]
    timesteps = NUM_TRAIN_TIMESTEPS * shift * sigmas / (1 + (shift - 1) * sigmas)
    bell = np.exp(-2 * ((timesteps - 500) / NUM_TRAIN_TIMESTEPS) ** 2)
    return float(bell.min()), float((bell - bell.min()).mean())


def loss_weight(sigma: "Tensor", weighting: Weighting, shift: float = 5.0) -> "Tensor":
    """Weight of each sample's loss: (B,) -> (B,).

    `bell` is DiffSynth's: exp(-2 ((t - 500) / 1000)^2), less its minimum over the 1000 shifted timesteps,
    scaled to mean 1 over them. It is 0 at t = 1000 and 2.08 at t = 500 for shift 5.
    """
    if weighting == "none":
        return sigma.new_ones(sigma.shape)
    minimum, mean = _bell_constants(shift)
    bell = (-2 * ((NUM_TRAIN_TIMESTEPS * sigma - 500) / NUM_TRAIN_TIMESTEPS) ** 2).exp()
    return (bell - minimum) / mean


def step_loss(per_sample: "Tensor", weight: "Tensor", num_samples: int, num_data_ranks: int) -> "Tensor":
    """The scalar that one rank backpropagates for a micro-batch.

    Gradients are averaged over ranks, so sum(weight * loss) * num_data_ranks / num_samples on every rank gives
    the gradient of the mean over the optimizer step's `num_samples` samples, whatever the layout.
    """
    return (per_sample * weight).sum() * (num_data_ranks / num_samples)


def micro_batch_loss(
    predicted: "Tensor",
    target: "Tensor",
    mask: "Tensor | None",
    *,
    sigma: "Tensor",
    weight: "Tensor",
    weighting: Weighting,
    shift: float,
    num_samples: int,
    num_data_ranks: int,
) -> "tuple[Tensor, Tensor]":
    """Losses (B,) of a micro-batch, and the scalar that is backpropagated (`step_loss`).

    Args:
        predicted, target, mask: see `per_sample_mse`.
        sigma: (B,), see `loss_weight`.
        weight: (B,), 0 for a filler.
        weighting, shift: of the objective.
        num_samples, num_data_ranks: see `step_loss`.
    """
    per_sample = per_sample_mse(predicted, target, mask)
    weight = weight * loss_weight(sigma, weighting, shift)
    return per_sample, step_loss(per_sample, weight, num_samples, num_data_ranks)
