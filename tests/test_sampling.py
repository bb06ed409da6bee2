"""The Euler sampler against diffsynth's scheduler and forward, and against a field that can be integrated by hand."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.pipelines.wan_video import model_fn_wan_video

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit
from wan_accel.models.variants import VARIANTS, DitSize
from wan_accel.noising import conditions_of, impose_known
from wan_accel.sample_schedule import choose_rows, drawn_sigmas, euler_sigmas
from wan_accel.sampling import Velocity, sample_latents

SIZE = DitSize(
    dim=96, ffn_dim=192, num_layers=2, num_heads=8, in_dim=16, out_dim=16, freq_dim=64, text_dim=32
)  # fmt: skip
HIGH, LOW = VARIANTS["t2v-a14b"].experts
SHAPE = (1, 16, 3, 6, 8)


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_dit(seed: int, size: DitSize = SIZE) -> torch.nn.Module:
    dit = build_dit(size)
    generator = torch.Generator().manual_seed(seed)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)
    return dit


def velocity_of(models: dict[str, WanDenoiser]) -> Velocity:
    def velocity(noisy: torch.Tensor, sigma: float, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = models["high" if "high" in models and sigma >= 0.875 else next(reversed(models))]
        return model(noisy, 1000.0 * torch.tensor([sigma]), inputs["text"])

    return velocity


@torch.no_grad()
def diffsynth_latents(
    dits: list[torch.nn.Module], noise: torch.Tensor, texts: list[torch.Tensor], *, num_steps: int, shift: float,
    guidance: float, first: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The loop of diffsynth's `WanVideoPipeline.__call__`, with its switch of experts at 0.875."""
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(num_steps, shift=shift)
    latents = noise if first is None else torch.cat([first, noise[:, :, 1:]], dim=2)
    fused = {"fuse_vae_embedding_in_latents": first is not None}
    for timestep in scheduler.timesteps:
        dit = dits[-1] if timestep.item() < 875 else dits[0]
        positive, negative = (
            model_fn_wan_video(dit, latents=latents, timestep=timestep[None], context=text, **fused) for text in texts
        )
        direction = negative + guidance * (positive - negative) if guidance != 1.0 else positive
        latents = scheduler.step(direction, timestep, latents)
        if first is not None:
            latents[:, :, 0:1] = first
    return latents


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("num_experts", [1, 2])
def test_sampler_equals_diffsynth(num_experts: int, guidance: float) -> None:
    dits = [random_dit(seed) for seed in range(num_experts)]
    oracles = [copy.deepcopy(dit) for dit in dits]
    names = ["high", "low"] if num_experts == 2 else ["default"]
    denoisers = {name: WanDenoiser(dit) for name, dit in zip(names, dits)}
    noise, texts = rand(*SHAPE, seed=1), [rand(1, 512, 32, seed=2), rand(1, 512, 32, seed=3)]
    with torch.no_grad():
        ours = sample_latents(
            velocity_of(denoisers),
            {"latents": rand(*SHAPE, seed=4), "noise": noise, "text": texts[0]},
            sigmas=euler_sigmas(12, 12.0),
            guidance=guidance,
            unconditional={"text": texts[1]},
        )
    expected = diffsynth_latents(oracles, noise, texts, num_steps=12, shift=12.0, guidance=guidance)
    assert (expected - noise).abs().max() > 0.3  # the loop moved
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_first_frame_that_is_given_equals_diffsynth() -> None:
    """ti2v-5b: the clean frame at timestep 0 in every forward, and put back after every step."""
    variant = VARIANTS["ti2v-5b"]
    dit = random_dit(0, dataclasses.replace(SIZE, in_dim=48, out_dim=48))
    oracle, denoiser = copy.deepcopy(dit), WanDenoiser(dit)
    shape = (1, 48, 3, 4, 6)
    batch = {
        "latents": rand(*shape, seed=4), "noise": rand(*shape, seed=1), "text": rand(1, 512, 32, seed=2),
        "drop_image": torch.tensor([False]),
    }  # fmt: skip
    null, first = rand(1, 512, 32, seed=3), batch["latents"][:, :, :1]

    def velocity(noisy: torch.Tensor, sigma: float, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        level = torch.tensor([sigma])
        return denoiser(noisy, 1000.0 * level, **conditions_of(inputs, level, variant))

    with torch.no_grad():
        ours = sample_latents(
            velocity, batch, sigmas=euler_sigmas(6, 5.0), guidance=3.0, unconditional={**batch, "text": null},
            impose_known=partial(impose_known, batch=batch, variant=variant),
        )  # fmt: skip
    expected = diffsynth_latents(
        [oracle], batch["noise"], [batch["text"], null], num_steps=6, shift=5.0, guidance=3.0, first=first
    )
    assert torch.equal(ours[:, :, :1], first)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_schedule_is_diffsynths() -> None:
    scheduler = FlowMatchScheduler("Wan")
    for num_steps, shift in ((30, 5.0), (40, 12.0), (7, 1.0), (50, 3.3)):
        scheduler.set_timesteps(num_steps, shift=shift)
        assert euler_sigmas(num_steps, shift) == pytest.approx([*scheduler.sigmas.tolist(), 0.0], abs=1e-6)


def test_field_of_straight_lines_arrives_at_once() -> None:
    """With the true velocity noise - x_0 of one sample, one step and fifty end at x_0."""
    latents, noise = rand(2, 4, 3, 2, 2, seed=0), rand(2, 4, 3, 2, 2, seed=1)
    inputs = {"latents": torch.full_like(latents, 7.0), "noise": noise}
    for num_steps in (1, 50):
        drawn = sample_latents(lambda x, s, i: noise - latents, inputs, sigmas=euler_sigmas(num_steps, 5.0))
        torch.testing.assert_close(drawn, latents, rtol=0, atol=1e-5)


def test_curved_field_converges_to_its_integral() -> None:
    """dx / dsigma = x has x(0) = x(1) / e; Euler's error falls as 1 / steps."""
    noise = rand(1, 4, 1, 2, 2, seed=1)
    inputs = {"latents": noise, "noise": noise}
    errors = [
        float((sample_latents(lambda x, s, i: x, inputs, sigmas=euler_sigmas(n, 1.0)) - noise / torch.e).abs().max())
        for n in (50, 100)
    ]
    assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_guidance_extrapolates_and_one_is_a_single_forward() -> None:
    inputs = {"latents": torch.zeros(1, 1, 1, 1, 1), "noise": torch.ones(1, 1, 1, 1, 1), "text": torch.tensor(2.0)}
    calls: list[float] = []

    def velocity(x: torch.Tensor, sigma: float, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(sigma)
        return conditions["text"].expand_as(x)

    drawn = sample_latents(velocity, inputs, sigmas=[1.0, 0.0], guidance=3.0, unconditional={"text": torch.tensor(1.0)})
    assert float(drawn) == 1 - (1 + 3 * (2 - 1))
    assert len(calls) == 2
    sample_latents(velocity, inputs, sigmas=[1.0, 0.5, 0.0])
    assert calls[2:] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"guidance=3.0 needs unconditional inputs"):
        sample_latents(velocity, inputs, sigmas=[1.0, 0.0], guidance=3.0)


def test_known_frames_are_put_back_before_every_forward() -> None:
    latents, noise = rand(1, 2, 3, 2, 2, seed=0), rand(1, 2, 3, 2, 2, seed=1)
    seen = []

    def impose(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents[:, :, :1], x[:, :, 1:]], dim=2)

    def velocity(x: torch.Tensor, sigma: float, conditions: object) -> torch.Tensor:
        seen.append(x[:, :, :1].clone())
        return torch.ones_like(x)

    drawn = sample_latents(
        velocity, {"latents": latents, "noise": noise}, sigmas=euler_sigmas(3, 5.0), impose_known=impose
    )
    assert all(torch.equal(frame, latents[:, :, :1]) for frame in [*seen, drawn[:, :, :1]])


def test_experts_split_the_schedule_at_the_boundary() -> None:
    whole = drawn_sigmas(30, 12.0, [HIGH, LOW])
    high, low = drawn_sigmas(30, 12.0, [HIGH]), drawn_sigmas(30, 12.0, [LOW])
    assert whole == euler_sigmas(30, 12.0)
    assert [*high[:-1], *low] == whole  # nothing twice, nothing left out
    assert high[-2] >= 0.875 > low[0] and high[-1] == low[-1] == 0.0
    assert drawn_sigmas(4, 5.0, VARIANTS["animate-14b"].experts) == euler_sigmas(4, 5.0)
    with pytest.raises(ValueError, match="num_steps=1 has no step for the low expert at shift 12: use more"):
        drawn_sigmas(1, 12.0, [LOW])


def test_one_expert_alone_starts_or_ends_with_what_it_knows() -> None:
    """High: its last step is its x_0 prediction. Low: it starts from the noised truth, and a true field restores it."""
    latents, noise = rand(*SHAPE, seed=0), rand(*SHAPE, seed=1)
    inputs = {"latents": latents, "noise": noise}
    for expert in (HIGH, LOW):
        starts: list[torch.Tensor] = []

        def velocity(x: torch.Tensor, sigma: float, conditions: object, starts: list = starts) -> torch.Tensor:
            starts.append(x)
            return noise - latents

        sigmas = drawn_sigmas(30, 12.0, [expert])
        drawn = sample_latents(velocity, inputs, sigmas=sigmas)
        torch.testing.assert_close(drawn, latents, rtol=0, atol=1e-5)
        expected = (1 - sigmas[0]) * latents + sigmas[0] * noise
        torch.testing.assert_close(starts[0], expected, rtol=0, atol=1e-6)


def test_rows_come_from_many_sources() -> None:
    groups = ["a", "a", "a", "b", "b", "c", "d"]
    assert choose_rows([0, 1, 2, 3, 4, 5], groups, 3) == [0, 3, 5]
    assert choose_rows([0, 1, 2, 3, 4, 5], groups, 5) == [0, 3, 5, 1, 4]
    with pytest.raises(ValueError, match="num_clips=3 but validation has 2 clips"):
        choose_rows([0, 3], groups, 3)
