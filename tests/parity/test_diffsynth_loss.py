"""`objective.preset: diffsynth` against DiffSynth's own loss, for the same noise and timestep."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.loss import FlowMatchSFTLoss
from diffsynth.pipelines.wan_video import model_fn_wan_video
from synthetic import SyntheticSource

from wan_accel.arguments import WanTrainingArguments
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit
from wan_accel.models.variants import VARIANTS, DitSize
from wan_accel.recipe.arguments import training_arguments
from wan_accel.recipe.load import load_recipe
from wan_accel.trainer import WanTrainer

GRID = 1000


def diffsynth_loss(pipe: SimpleNamespace, latents: torch.Tensor, context: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    low, high = pipe.index_range
    return FlowMatchSFTLoss(
        pipe, input_latents=latents, context=context, min_timestep_boundary=low, max_timestep_boundary=high
    )


@pytest.fixture(scope="module")
def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    size = DitSize(dim=96, ffn_dim=128, num_layers=2, num_heads=8, in_dim=16, out_dim=16, freq_dim=32, text_dim=24)
    return build_dit(size)


# DiffSynth's ranges of index fractions: both ends, the whole, and the experts of the t2v pair.
@pytest.mark.parametrize("index_range", [(0.0, 1.0), (0.0, 0.417), (0.417, 1.0)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_preset_is_diffsynths_loss(
    dit: torch.nn.Module, index_range: tuple[float, float], seed: int, tmp_path: Path
) -> None:
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(GRID, training=True)
    pipe = SimpleNamespace(
        scheduler=scheduler, torch_dtype=torch.float32, device="cpu", in_iteration_models=("dit",), dit=dit,
        model_fn=model_fn_wan_video, index_range=index_range,
    )  # fmt: skip
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(7))
    context = torch.randn(1, 512, 24, generator=torch.Generator().manual_seed(8))
    expected = diffsynth_loss(pipe, latents, context, seed)

    torch.manual_seed(seed)  # the same draws again
    index = torch.randint(int(index_range[0] * GRID), int(index_range[1] * GRID), (1,))
    noise = torch.randn_like(latents)
    batch = {
        "latents": latents, "noise": noise, "text": context, "sigma": scheduler.sigmas[index],
        "weight": torch.ones(1),
    }  # fmt: skip
    found = preset_loss(WanDenoiser(copy.deepcopy(dit)), batch, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def preset_loss(denoiser: WanDenoiser, batch: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """The loss of a micro-batch in a WanTrainer with the arguments of a recipe that has the preset."""
    arguments = training_arguments(load_recipe("t2v-1.3b/lora", ["objective={preset: diffsynth}"]))
    chosen = {key: arguments[key] for key in ("density", "shift", "weighting")}
    args = WanTrainingArguments(output_dir=str(folder), use_cpu=True, max_steps=1, **chosen)
    source = SyntheticSource("t2v-1.3b")
    trainer = WanTrainer(denoiser, args, source, variant=VARIANTS["t2v-1.3b"])
    return trainer._micro_loss("default", batch, num_samples=1).detach()


def test_ranges_of_experts_are_diffsynths() -> None:
    """DiffSynth's scripts cut the shifted grid at 0.417 (t2v) and 0.358 (i2v); ours follow from the boundary."""
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(GRID, training=True)
    for name, cut in (("t2v-a14b", 0.417), ("i2v-a14b", 0.358)):
        high, low = VARIANTS[name].experts
        experts = [high.covers(sigma) for sigma in scheduler.sigmas.tolist()]
        assert all(experts[: int(cut * GRID) - 1]) and not any(experts[int(cut * GRID) + 1 :])
        assert all(low.covers(sigma) != high.covers(sigma) for sigma in scheduler.sigmas.tolist())
