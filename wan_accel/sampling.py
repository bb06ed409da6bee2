"""Draw latents from a velocity field: Euler steps with classifier-free guidance. Pure."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from wan_accel.objective import add_noise

Inputs = Mapping[str, Tensor]
# (noisy latents (B, C, F, h, w) fp32, sigma, the conditions) -> velocity of the same shape.
Velocity = Callable[[Tensor, float, Inputs], Tensor]


def nothing_known(latents: Tensor) -> Tensor:
    """`impose_known` of variants that generate every latent frame."""
    return latents


def sample_latents(
    velocity: Velocity,
    inputs: Inputs,
    *,
    sigmas: Sequence[float],
    guidance: float = 1.0,
    unconditional: Inputs | None = None,
    impose_known: Callable[[Tensor], Tensor] = nothing_known,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Integrate dx / dsigma = velocity from sigmas[0] to sigmas[-1].

    x += (next sigma - sigma) * velocity;  with guidance g, velocity = v_null + g * (v - v_null)

    Args:
        velocity: the model.
        inputs: a micro-batch: `latents` and `noise` (B, C, F, h, w), and the conditions. It starts from
            (1 - sigma) * latents + sigma * noise, which at sigma 1 is the noise alone.
        sigmas: noise levels, falling.
        guidance: 1 runs the model once a step, anything else twice.
        unconditional: the inputs that guidance steers away from; needed unless guidance is 1.
        impose_known: puts latent frames that are given, not generated, back in place: before the first step and
            after each.
        on_step: called after every step, for a progress bar.

    Returns:
        (B, C, F, h, w) fp32.

    Raises:
        ValueError: guidance without unconditional inputs.
    """
    if guidance != 1.0 and unconditional is None:
        raise ValueError(f"guidance={guidance} needs unconditional inputs")
    latents, noise = inputs["latents"].float(), inputs["noise"].float()
    x = impose_known(add_noise(latents, noise, noise.new_full((len(noise),), sigmas[0])))
    for sigma, following in pairwise(sigmas):
        direction = velocity(x, sigma, inputs)
        if unconditional is not None and guidance != 1.0:
            null = velocity(x, sigma, unconditional)
            direction = null + guidance * (direction - null)
        x = impose_known(x + (following - sigma) * direction)
        on_step()
    return x
