"""The first frame as a condition, against diffsynth's pipeline units and its loss, on the same tiny weights."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.loss import FlowMatchSFTLoss
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE, WanVideoVAE38
from diffsynth.pipelines.wan_video import (
    WanVideoUnit_ImageEmbedderCLIP,
    WanVideoUnit_ImageEmbedderFused,
    WanVideoUnit_ImageEmbedderVAE,
    model_fn_wan_video,
)
from oracle import precise, randomise
from PIL import Image
from tiny_clips import clip_row

from wan_accel.data.cells import cell_to_tensor
from wan_accel.data.clips import Clip, load_clip
from wan_accel.models.checkpoint_files import encoder_files
from wan_accel.models.conditioning.clips import ClipEncoder
from wan_accel.models.conditioning.image import first_frame_pixels, join_first_frame, unknown_frames
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import build_dit
from wan_accel.models.encoders import CLIP_MEAN, CLIP_STD, LATENT_STATISTICS
from wan_accel.models.variants import CLIP_FILE, Variant, get_variant
from wan_accel.noising import noise_batch
from wan_accel.objective import loss_weight, per_sample_mse
from wan_accel.tiny import init_tiny

HW = (64, 96)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(clip_row(0, num_frames=9, hw=HW))


@pytest.fixture(scope="module", params=["i2v-a14b", "i2v-14b-480p", "ti2v-5b"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    init_tiny(request.param, folder)
    return ClipEncoder(get_variant(request.param), folder, known_variants=0)


def diffsynth_pipe(encoder: ClipEncoder) -> Any:
    """What diffsynth's units ask of a pipeline, around the encoder's own networks."""
    variant = encoder.variant
    vae = (WanVideoVAE if variant.vae.name == "wan2.1" else WanVideoVAE38).__new__(WanVideoVAE)
    torch.nn.Module.__init__(vae)  # its own __init__ builds the full size
    mean, std = (torch.tensor(values) for values in LATENT_STATISTICS[variant.vae.name])
    vae.model, vae.scale, vae.z_dim = encoder.vae.model, [mean, 1.0 / std], variant.vae.latent_channels
    pipe = SimpleNamespace(
        device="cpu", torch_dtype=torch.float32, vae=vae, load_models_to_device=lambda names: None, image_encoder=None,
        dit=SimpleNamespace(
            require_vae_embedding="first_frame" in variant.conditioning,
            require_clip_embedding="clip" in variant.conditioning,
            fuse_vae_embedding_in_latents="fused_first_frame" in variant.conditioning,
        ),
    )  # fmt: skip
    pipe.preprocess_image = lambda image: BasePipeline.preprocess_image(pipe, image)
    if "clip" in variant.conditioning:
        pipe.image_encoder = WanImageEncoder.__new__(WanImageEncoder)
        torch.nn.Module.__init__(pipe.image_encoder)
        pipe.image_encoder.model = SimpleNamespace(image_size=224, visual=encoder.clip.model)
        clip_mean, clip_std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pipe.image_encoder.transforms = SimpleNamespace(transforms=[lambda pixels: (pixels - clip_mean) / clip_std])
    return pipe


def of_diffsynth(encoder: ClipEncoder, clip: Clip) -> dict[str, torch.Tensor]:
    """What diffsynth's three image units make of a clip's first frame."""
    pipe, image = diffsynth_pipe(encoder), Image.fromarray(clip.frames_rgb[0])
    sizes: dict[str, Any] = {"height": HW[0], "width": HW[1]}
    tiles: dict[str, Any] = {"tiled": False, "tile_size": None, "tile_stride": None}
    noise = torch.zeros(1, encoder.variant.vae.latent_channels, 3, 4, 6)
    with torch.no_grad():
        return {
            **WanVideoUnit_ImageEmbedderVAE().process(pipe, image, None, num_frames=9, **sizes, **tiles),
            **WanVideoUnit_ImageEmbedderCLIP().process(pipe, image, None, **sizes),
            **WanVideoUnit_ImageEmbedderFused().process(pipe, image, noise, **sizes, **tiles),
        }


def test_conditions_equal_the_units_of_diffsynth(encoder: ClipEncoder, clip: Clip) -> None:
    """Stored in bf16, so diffsynth's fp32 is rounded once; the two scale pixels in another order, hence 1e-2."""
    columns, theirs = encoder.encode(clip), of_diffsynth(encoder, clip)
    expected = {"latents"}
    if "first_frame" in encoder.variant.conditioning:
        expected |= {"image_latents"}
        ours = join_first_frame(cell_to_tensor(columns["image_latents"]))
        assert ours.shape == (20, 3, 8, 12)
        assert torch.equal(ours[:4].float(), theirs["y"][0, :4])
        torch.testing.assert_close(ours.float(), theirs["y"][0], rtol=1e-2, atol=1e-3)
    if "clip" in encoder.variant.conditioning:
        expected |= {"clip_features"}
        features = cell_to_tensor(columns["clip_features"]).float()
        torch.testing.assert_close(features, theirs["clip_feature"][0], rtol=1e-2, atol=1e-3)
    if "fused_first_frame" in encoder.variant.conditioning:
        latents = cell_to_tensor(columns["latents"])
        torch.testing.assert_close(latents[:, :1].float(), theirs["first_frame_latents"][0], rtol=1e-2, atol=1e-3)
    assert columns.keys() == expected


def test_latent_frame_0_is_the_first_frame_alone(encoder: ClipEncoder, clip: Clip) -> None:
    """The VAEs are causal, so the fused first frame needs no column of its own: bit for bit."""
    columns = encoder.encode(clip)
    pixels = torch.tensor(clip.frames_rgb).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert torch.equal(cell_to_tensor(columns["latents"])[:, :1], encoder.video(pixels[:, :1]))
    if "first_frame" in encoder.variant.conditioning:
        later = cell_to_tensor(columns["image_latents"])[:, 1:]
        assert not torch.equal(later, cell_to_tensor(columns["latents"])[:, 1:])  # grey behind the first frame


def test_keys_of_the_files_that_images_are_made_with() -> None:
    vae = get_variant("i2v-a14b").vae.file
    assert encoder_files(get_variant("i2v-a14b"))["image"] == (vae,)
    assert encoder_files(get_variant("i2v-14b-720p"))["image"] == (vae, CLIP_FILE)
    assert "image" not in encoder_files(get_variant("ti2v-5b"))


def test_clip_of_one_frame_is_refused(encoder: ClipEncoder, clip: Clip) -> None:
    single = dataclasses.replace(clip, frames_rgb=clip.frames_rgb[:1])
    with pytest.raises(ValueError, match=f"square0 has one frame, which {encoder.variant.name} is given: nothing is"):
        encoder.encode(single)


def test_mask_and_pixels_of_the_first_frame() -> None:
    pixels = first_frame_pixels(frames := torch.rand(3, 5, 4, 4) + 1)
    assert torch.equal(pixels[:, 0], frames[:, 0]) and not pixels[:, 1:].any()
    condition = join_first_frame(latents := torch.rand(16, 3, 2, 2))
    assert (condition[:4, 0] == 1).all() and not condition[:4, 1:].any()
    assert torch.equal(condition[4:], latents)


TI2V = get_variant("ti2v-5b")


def micro_batch(variant: Variant, drops: list[bool], sigmas: list[float]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (len(drops), variant.vae.latent_channels, 3, 4, 6)
    return {
        "latents": torch.randn(shape, generator=generator), "noise": torch.randn(shape, generator=generator),
        "text": torch.randn(len(drops), 512, 24, generator=generator),
        "sigma": torch.tensor(sigmas), "weight": torch.ones(len(drops)), "drop_image": torch.tensor(drops),
    }  # fmt: skip


def test_fused_frame_is_clean_and_out_of_the_loss_unless_dropped() -> None:
    batch = micro_batch(TI2V, [False, True], [0.5, 0.8])
    noisy = noise_batch(batch, TI2V)
    plain = noise_batch(batch, get_variant("t2v-1.3b"))
    assert torch.equal(noisy.hidden_states[0, :, 0], batch["latents"][0, :, 0])
    assert torch.equal(noisy.hidden_states[0, :, 1:], plain.hidden_states[0, :, 1:])
    assert torch.equal(noisy.hidden_states[1], plain.hidden_states[1])
    assert noisy.timestep.tolist() == [500.0, 800.0]
    assert noisy.conditions.pop("first_frame_timestep").tolist() == [0.0, 800.0]
    assert noisy.conditions.keys() == plain.conditions.keys() == {"text"} and plain.loss_mask is None
    assert noisy.loss_mask is not None
    assert noisy.loss_mask.flatten(1).tolist() == [[False, True, True], [True, True, True]]


def test_masked_loss_is_the_mean_over_what_is_left() -> None:
    predicted, target = torch.rand(2, 4, 3, 2, 2), torch.rand(2, 4, 3, 2, 2)
    loss = per_sample_mse(predicted, target, unknown_frames(3, torch.tensor([True, False])))
    kept = (predicted[:1, :, 1:] - target[:1, :, 1:]).square().mean()
    torch.testing.assert_close(loss, torch.stack([kept, (predicted[1] - target[1]).square().mean()]))


@pytest.mark.parametrize("drop", [False, True], ids=["image to video", "text to video"])
def test_loss_equals_flow_match_sft_loss(drop: bool) -> None:
    """The same noise and timestep give DiffSynth's loss and gradients; sums in another order, hence 1e-5."""
    dit = build_dit(dataclasses.replace(TI2V.dit, dim=96, ffn_dim=128, num_layers=2, num_heads=8, text_dim=24))
    randomise(dit)
    oracle = precise(dit)
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(1000, training=True)
    pipe = SimpleNamespace(
        scheduler=scheduler, torch_dtype=torch.float32, device="cpu", dit=oracle, in_iteration_models=("dit",),
        model_fn=model_fn_wan_video,
    )  # fmt: skip
    batch = micro_batch(TI2V, [drop], [0.0])
    inputs: dict[str, Any] = {"input_latents": batch["latents"], "context": batch["text"]}
    if not drop:
        inputs |= {"first_frame_latents": batch["latents"][:, :, :1], "fuse_vae_embedding_in_latents": True}
    torch.manual_seed(11)
    expected = FlowMatchSFTLoss(pipe, **inputs)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}
    dit.zero_grad()

    torch.manual_seed(11)
    timestep_id = torch.randint(0, 1000, (1,))
    batch |= {"noise": torch.randn_like(batch["latents"]), "sigma": scheduler.sigmas[timestep_id]}
    noisy = noise_batch(batch, TI2V)
    denoiser = WanDenoiser(dit)
    predicted = denoiser(noisy.hidden_states, noisy.timestep, **noisy.conditions)
    loss = per_sample_mse(predicted, noisy.target, noisy.loss_mask) * loss_weight(batch["sigma"], "bell", 5.0)
    loss.sum().backward()
    torch.testing.assert_close(loss[0], expected.squeeze(), rtol=1e-5, atol=0)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in denoiser.named_parameters():
        bound = 1e-5 * max(gradients[name].norm(), 1e-2 * largest)
        assert (parameter.grad - gradients[name]).norm() <= bound, name
