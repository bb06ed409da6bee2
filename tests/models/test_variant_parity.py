"""Every variant's denoiser against diffsynth's functional forward: outputs and all gradients."""

import copy
import dataclasses

import pytest
import torch
from diffsynth.pipelines.wan_video import model_fn_wan_video
from oracle import assert_same_gradients, precise, randomise

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import VARIANTS, Conditioning, DitSize

DIM, HEADS, LAYERS, TEXT_DIM, CLIP_DIM = 96, 8, 6, 32, 40
ADAPTER = AnimateSize(
    dim=DIM, num_heads=HEADS, num_face_blocks=2, motion_channels=(2, 3, 4, 4, 6, 6, 8, 8), motion_dim=32, face_width=16
)
TIMESTEPS = (321.7, 950.3, 41.9)
# Shape of each input behind the batch, by condition; C channels of the latents, F = 2 latent frames.
SHAPES: dict[Conditioning, dict[str, tuple[int, ...]]] = {
    "reference": {"condition": (20, 2, 6, 8)},
    "first_frame": {"condition": (20, 2, 6, 8)},
    "clip": {"clip_features": (257, CLIP_DIM)},
    "pose": {"pose_latents": (16, 1, 6, 8)},
    "face": {"face_pixel_values": (3, 1, 512, 512)},
    "known": {},
    "fused_first_frame": {},
}
NAMES = {"condition": "y", "clip_features": "clip_feature"}  # diffsynth's


def tiny(size: DitSize) -> DitSize:
    """The same inputs and outputs, everything else small."""
    return dataclasses.replace(
        size, dim=DIM, ffn_dim=192, num_layers=LAYERS, num_heads=HEADS, freq_dim=64, text_dim=TEXT_DIM,
        clip_dim=CLIP_DIM if size.clip_dim else None,
    )  # fmt: skip


def architectures() -> dict[str, tuple[DitSize, tuple[Conditioning, ...]]]:
    """What differs between variants at tiny size, named by the variants that share it."""
    found: dict[tuple[DitSize, tuple[Conditioning, ...]], list[str]] = {}
    for variant in VARIANTS.values():
        found.setdefault((tiny(variant.dit), variant.conditioning), []).append(variant.name)
    return {"+".join(names): architecture for architecture, names in found.items()}


def inputs_of(
    size: DitSize, conditioning: tuple[Conditioning, ...], batch: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (size.out_dim, 2, 6, 8), "text": (512, TEXT_DIM)}
    for kind in conditioning:
        shapes |= SHAPES[kind]
    inputs = {name: torch.randn(batch, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    inputs["timestep"] = torch.tensor(TIMESTEPS[:batch], dtype=dtype)
    if "fused_first_frame" in conditioning:
        # The second sample is plain text to video: one timestep for all of its tokens.
        inputs["first_frame_timestep"] = torch.tensor([0.0, TIMESTEPS[1], 0.0][:batch], dtype=dtype)
    return inputs


def diffsynth_velocity(dit: torch.nn.Module, adapter: torch.nn.Module | None, **inputs: torch.Tensor) -> torch.Tensor:
    """diffsynth's forward, a sample at a time: its timestep a token fails for samples of several timesteps."""
    samples = [
        {name: value[index : index + 1] for name, value in inputs.items()} for index in range(len(inputs["timestep"]))
    ]
    return torch.cat([_one_velocity(dit, adapter, **sample) for sample in samples])


def _one_velocity(
    dit: torch.nn.Module,
    adapter: torch.nn.Module | None,
    *,
    hidden_states: torch.Tensor,
    text: torch.Tensor,
    timestep: torch.Tensor,
    first_frame_timestep: torch.Tensor | None = None,
    **conditions: torch.Tensor,
) -> torch.Tensor:
    if "face_pixel_values" in conditions:
        # Reentrant checkpointing inside diffsynth needs a leaf that requires a gradient to train the motion encoder.
        conditions["face_pixel_values"] = conditions["face_pixel_values"].clone().requires_grad_()
    return model_fn_wan_video(
        dit, animate_adapter=adapter, latents=hidden_states, timestep=timestep, context=text,
        fuse_vae_embedding_in_latents=first_frame_timestep is not None and first_frame_timestep.item() == 0,
        **{NAMES.get(name, name): value for name, value in conditions.items()},
    )  # fmt: skip


# fp64 shows the formulae to be the same; fp32 is held to what the order of sums allows.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "batch", "checkpointing"),
    [
        (torch.float32, 1e-5, 1, False),
        (torch.float32, 1e-5, 1, True),
        (torch.float32, 1e-5, 3, False),
        (torch.float32, 1e-5, 3, True),
        (torch.float64, 1e-9, 1, False),
        (torch.float64, 1e-9, 3, True),
    ],
)
@pytest.mark.parametrize("names", architectures())
def test_equals_diffsynth(names: str, dtype: torch.dtype, tolerance: float, batch: int, checkpointing: bool) -> None:
    size, conditioning = architectures()[names]
    dit = build_dit(size)
    adapter = build_animate_adapter(ADAPTER) if "pose" in conditioning else None
    modules = [dit] if adapter is None else [dit, adapter]
    for seed, module in enumerate(modules):
        randomise(module, seed)
        module.to(dtype)
    oracle = [precise(copy.deepcopy(module)) for module in modules]
    denoiser = WanDenoiser(dit, adapter, with_motion_encoder=True)
    for block in denoiser.blocks:
        block.checkpointing = checkpointing
    inputs = inputs_of(size, conditioning, batch, dtype)
    out = denoiser(**inputs)
    expected = diffsynth_velocity(oracle[0], oracle[1] if adapter is not None else None, **inputs)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (out * weights).mean().backward()
    (expected * weights).mean().backward()
    assert_same_gradients(denoiser, oracle, tolerance)


@pytest.mark.parametrize("names", architectures())
def test_every_parameter_gets_a_gradient(names: str) -> None:
    """What DDP relies on when it does not search for unused parameters, with all that may be left out left out."""
    size, conditioning = architectures()[names]
    denoiser = WanDenoiser(build_dit(size), build_animate_adapter(ADAPTER) if "pose" in conditioning else None)
    inputs = inputs_of(size, conditioning, 1, torch.float32)
    inputs.pop("first_frame_timestep", None)
    if inputs.pop("face_pixel_values", None) is not None:
        inputs["motion_vectors"] = torch.zeros(1, 1, ADAPTER.motion_dim)
    denoiser(**inputs).square().mean().backward()
    assert [name for name, parameter in denoiser.named_parameters() if parameter.grad is None] == []
