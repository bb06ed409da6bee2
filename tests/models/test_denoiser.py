"""WanDenoiser against diffsynth's own functional forward, and against the original code's recorded outputs."""

import copy
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffsynth.pipelines.wan_video import model_fn_wan_video
from oracle import assert_same_gradients, precise, randomise

from wan_accel.models.attention import rope_table
from wan_accel.models.denoiser import WanDenoiser, sinusoidal_embedding
from wan_accel.models.dit import (
    AnimateSize,
    animate_size_from_shapes,
    build_animate_adapter,
    build_dit,
    dit_size_from_shapes,
)
from wan_accel.models.variants import VARIANTS, DitSize

GOLDENS = Path(os.environ.get("WAN_ACCEL_GOLDENS", Path(__file__).parents[1] / "golden")) / "model"
TINY = dict(dim=96, ffn_dim=192, num_layers=6, num_heads=8, out_dim=16, freq_dim=64, text_dim=32)
TINY_ADAPTER = AnimateSize(
    dim=96,
    num_heads=8,
    num_face_blocks=2,
    motion_channels=(2, 3, 4, 4, 6, 6, 8, 8),
    motion_dim=32,
    face_width=16,
)


def animate_inputs(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = dict(
        hidden_states=rand(16, 3, 6, 8), timestep=torch.tensor([321.7, 950.3])[:batch], text=rand(512, 32),
        condition=rand(20, 3, 6, 8), clip_features=rand(257, 40), pose_latents=rand(16, 2, 6, 8),
        face_pixel_values=rand(3, 5, 512, 512).clamp(-1, 1),
    )  # fmt: skip
    return {name: value.to(dtype) for name, value in inputs.items()}


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])


@PRECISIONS
def test_animate_equals_diffsynth_over_several_frames(dtype: torch.dtype, tolerance: float) -> None:
    """Motion of five video frames in two latent frames; batches and checkpointing are in test_variant_parity."""
    dit = build_dit(DitSize(**TINY, in_dim=36, clip_dim=40))
    adapter = build_animate_adapter(TINY_ADAPTER)
    randomise(dit)
    randomise(adapter, seed=2)
    dit.to(dtype), adapter.to(dtype)
    oracle, oracle_adapter = precise(copy.deepcopy(dit)), precise(copy.deepcopy(adapter))
    denoiser = WanDenoiser(dit, adapter, with_motion_encoder=True)
    inputs = animate_inputs(1, dtype)
    out = denoiser(**inputs)
    # Reentrant checkpointing inside diffsynth needs a leaf that requires a gradient to train the motion encoder.
    face = inputs["face_pixel_values"].clone().requires_grad_()
    expected = model_fn_wan_video(
        oracle, animate_adapter=oracle_adapter, latents=inputs["hidden_states"], timestep=inputs["timestep"],
        context=inputs["text"], y=inputs["condition"], clip_feature=inputs["clip_features"],
        pose_latents=inputs["pose_latents"], face_pixel_values=face,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (out * weights).mean().backward()
    (expected * weights).mean().backward()
    assert_same_gradients(denoiser, [oracle, oracle_adapter], tolerance)


def test_every_adapter_tensor_gets_a_gradient() -> None:
    """Full training with the motion encoder kept; under diffsynth's own `get_motion` 41 of 61 tensors get none."""
    adapter = build_animate_adapter(TINY_ADAPTER)
    names = [name for name, _ in adapter.named_parameters() if not name.endswith(".kernel")]
    dit = build_dit(DitSize(**TINY, in_dim=36, clip_dim=40))
    randomise(dit)
    randomise(adapter, seed=2)
    denoiser = WanDenoiser(dit, adapter, with_motion_encoder=True)
    denoiser(**animate_inputs(1)).square().mean().backward()
    parameters = dict(denoiser.named_parameters())
    assert len(names) > 50 and {name.split(".")[0] for name in names} == {
        "pose_patch_embedding", "motion_encoder", "face_adapter", "face_encoder"
    }  # fmt: skip
    assert [name for name in names if parameters[name].grad is None or not parameters[name].grad.any()] == []


def test_pose_reaches_its_own_latent_frame_behind_the_reference() -> None:
    """Without blocks a frame's output sees only its own input: pose latent k goes to latent frame k + 1."""
    denoiser = WanDenoiser(build_dit(DitSize(**TINY, in_dim=36, clip_dim=40)), build_animate_adapter(TINY_ADAPTER))
    denoiser.blocks = torch.nn.ModuleList()
    inputs = animate_inputs(1)
    inputs.pop("face_pixel_values")
    inputs["motion_vectors"] = torch.zeros(1, 5, 32)
    before = denoiser(**inputs)
    for frame in range(2):
        changed = inputs["pose_latents"].clone()
        changed[:, :, frame] += 1
        difference = (denoiser(**{**inputs, "pose_latents": changed}) - before).abs().amax(dim=(0, 1, 3, 4))
        assert [bool(value > 0) for value in difference] == [number == frame + 1 for number in range(3)]


def golden_weights(module: torch.nn.Module, shapes: dict[str, list[int]]) -> None:
    """The recorded models' weights: PCG64 seeded by the name's crc32 (tests/golden/model/README.md)."""
    state = {}
    for name, shape in shapes.items():
        value = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(
            shape, dtype=np.float32
        )
        std = 0.02 if len(shape) < 2 else 1 / np.sqrt(np.prod(shape[1:]))
        value = value * np.float32(std) + (1 if len(shape) == 1 and name.endswith("weight") else 0)
        state[name] = torch.from_numpy(value.astype(np.float32))
    left_out = module.load_state_dict(state, strict=False)
    assert not left_out.unexpected_keys
    assert all(name.endswith(".kernel") for name in left_out.missing_keys)


def rnd(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)
    )


def test_original_ti2v_timesteps() -> None:
    """Tokens of the first latent frame at timestep 0, the others at 321: a row a token in the original."""
    golden = np.load(GOLDENS / "21_tiny_wanmodel.npz")
    shapes = json.loads((GOLDENS / "21_t2v_param_shapes.json").read_text())
    dit = build_dit(dit_size_from_shapes(shapes, num_heads=4))
    golden_weights(dit, shapes)
    with torch.no_grad():
        out = WanDenoiser(dit, text_length=8)(
            rnd(1, 16, 3, 4, 6)[None], torch.tensor([321.0]), F_pad(rnd(3, 5, 24), 8),
            first_frame_timestep=torch.tensor([0.0]),
        )  # fmt: skip
    np.testing.assert_allclose(out[0].numpy(), golden["ti2v_out_token_t"].reshape(out[0].shape), atol=1e-4)


def test_every_row_has_a_released_size() -> None:
    marks = test_released_sizes_on_meta.pytestmark
    assert {name for mark in marks for name, _ in mark.args[1]} == set(VARIANTS)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_original_wanmodel(kind: str) -> None:
    golden = np.load(GOLDENS / "21_tiny_wanmodel.npz")
    shapes = json.loads((GOLDENS / f"21_{kind}_param_shapes.json").read_text())
    dit = build_dit(dit_size_from_shapes(shapes, num_heads=4))
    golden_weights(dit, shapes)
    with torch.no_grad():
        out = WanDenoiser(dit, text_length=8)(
            rnd(1, 16, 3, 4, 6)[None], torch.tensor([321.0]), F_pad(rnd(3, 5, 24), 8),
            condition=rnd(2, 20, 3, 4, 6)[None] if kind == "i2v" else None,
        )  # fmt: skip
    key = next(
        name for name in golden.files if name.startswith(kind) and "out" in name and "token" not in name
    )
    np.testing.assert_allclose(out[0].numpy(), golden[key].reshape(out[0].shape), atol=1e-4)


def test_original_animate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_accel.models.denoiser.FACES_PER_CHUNK", 1)
    golden = np.load(GOLDENS / "22_tiny_animate.npz")
    shapes = json.loads((GOLDENS / "22_animate_param_shapes.json").read_text())
    dit, adapter = (
        build_dit(dit_size_from_shapes(shapes, num_heads=4)),
        build_animate_adapter(animate_size_from_shapes(shapes)),
    )
    denoiser = WanDenoiser(dit, adapter, with_motion_encoder=True, text_length=8)
    golden_weights(denoiser, shapes)
    y, x = np.mgrid[0:512, 0:512] / 511.0
    face = np.stack(
        [
            [np.sin(3 * x + 0.3 * t + c) * np.cos(2 * y - 0.2 * t + 0.5 * c) for t in range(9)]
            for c in range(3)
        ]
    )
    with torch.no_grad():
        faces = torch.from_numpy(face.astype(np.float32))[None]
        expected = golden["motion_vec"].reshape(9, 512)
        found = denoiser.encode_motion(faces[:, :, [0, 8]])  # in two chunks; a frame takes seconds
        np.testing.assert_allclose(found[0].numpy(), expected[[0, 8]], atol=1e-4)
        motion = torch.from_numpy(expected)[None]
        tokens = denoiser.face_encoder(motion)
        np.testing.assert_allclose(tokens[0].numpy(), golden["face_encoder_out"].reshape(3, 5, 64), atol=1e-4)
        out = denoiser(
            rnd(11, 16, 4, 4, 6)[None], torch.tensor([700.0]), F_pad(rnd(15, 5, 24), 8),
            condition=rnd(12, 20, 4, 4, 6)[None], pose_latents=rnd(13, 1, 16, 3, 4, 6),
            clip_features=rnd(14, 1, 257, 1280), motion_vectors=motion,
        )  # fmt: skip
    np.testing.assert_allclose(out[0].numpy(), golden["out"].reshape(out[0].shape), atol=1e-4)


def test_original_rope_and_time_embedding() -> None:
    golden = np.load(GOLDENS / "20_contract.npz")
    embedding = sinusoidal_embedding(torch.from_numpy(golden["sinusoid_t"].ravel()), 256)
    np.testing.assert_allclose(embedding.numpy(), golden["sinusoid_256"], atol=1e-6)
    from wan_accel.models.attention import apply_rope

    x = torch.from_numpy(golden["rope_x"])[:, :36].float()
    grid = tuple(int(n) for n in golden["rope_grid"].ravel())
    cos, sin = rope_table(grid, 128, torch.device("cpu"))
    out = apply_rope(x.flatten(2), cos, sin, x.shape[2]).unflatten(-1, (x.shape[2], -1))
    np.testing.assert_allclose(out.numpy(), golden["rope_out"][:, :36], atol=2e-6)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("animate-14b", 16.395),
        ("t2v-a14b", 14.288),
        ("i2v-a14b", 14.289),
        ("ti2v-5b", 5.000),
        ("t2v-1.3b", 1.419),
        ("t2v-14b", 14.288),
        ("i2v-14b-480p", 16.395),
        ("i2v-14b-720p", 16.395),
    ],
)
def test_released_sizes_on_meta(name: str, billions: float) -> None:
    variant = VARIANTS[name]
    with torch.device("meta"):
        dit = build_dit(variant.dit)
        shapes = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
        denoiser = WanDenoiser(dit)
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e9, 3) == billions
    assert set(denoiser.state_dict()) == set(shapes)
    assert dit_size_from_shapes(shapes) == variant.dit


def test_missing_and_needless_inputs() -> None:
    denoiser = WanDenoiser(build_dit(DitSize(**TINY, in_dim=36)))
    inputs = animate_inputs(1)
    base = {key: inputs[key] for key in ("hidden_states", "timestep", "text")}
    with pytest.raises(ValueError, match="needs condition"):
        denoiser(**base)
    with pytest.raises(ValueError, match="cannot take pose_latents"):
        denoiser(**base, condition=inputs["condition"], pose_latents=inputs["pose_latents"])


def F_pad(context: torch.Tensor, length: int) -> torch.Tensor:
    """The recorded models have 8 text tokens, zeros behind a caption's own length."""
    return torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[0]))[None]


def test_blocks_choose_rows_without_a_graph_break() -> None:
    """A block and the head compile as one graph each, two timesteps a sample included."""
    denoiser = WanDenoiser(build_dit(DitSize(**TINY, in_dim=16)))
    x, context, own_row = torch.randn(3, 12, 96), torch.randn(3, 20, 96), torch.arange(12).unsqueeze(1) < 4
    cos, sin = rope_table((3, 2, 2), 12, x.device)
    inputs = (x, context, torch.randn(3, 2, 6, 96), cos, sin, own_row)
    for module, args in ((denoiser.blocks[0], inputs), (denoiser.head, (x, torch.randn(3, 2, 96), own_row))):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), module(*args))


def test_blocks_get_contiguous_tokens_and_attention_their_dtype() -> None:
    """A block keeps the layout of its tokens; a norm that computes in fp32 does not widen what attention gets."""
    denoiser = WanDenoiser(build_dit(DitSize(**TINY, in_dim=16))).bfloat16()
    seen: list[torch.Tensor] = []
    first = denoiser.transformer_blocks[0]
    first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    first.self_attn.norm_q.register_forward_hook(lambda _, arguments, out: out.float())
    first.self_attn.attn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    denoiser(**{key: animate_inputs(2)[key] for key in ("hidden_states", "timestep", "text")})
    assert seen[0].is_contiguous() and seen[1].dtype == torch.bfloat16
