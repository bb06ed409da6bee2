"""Known-pixel videos and masks against the recorded contract of the original code, and the joined condition."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from wan_accel.models.conditioning.animate import (
    KnownVariant,
    draw_known_variant,
    grow_mask,
    join_condition,
    known_mask,
    known_pixels,
    pack_mask_frames,
    to_pixels,
)

GOLDENS = Path(os.environ.get("WAN_ACCEL_GOLDENS", Path(__file__).parents[1] / "golden")) / "model"
MODES = ["animation", "replacement"]


@pytest.fixture(scope="module")
def contract() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "20_contract.npz") as file:
        return dict(file)


def source_mask(contract: dict[str, np.ndarray]) -> np.ndarray:
    """The recorded person mask (77, 32, 48), already grown."""
    shape = tuple(contract["mask_src_shape"])
    bits = np.unpackbits(contract["mask_src_pixels"].reshape(-1), count=int(np.prod(shape)))
    return bits.reshape(shape).astype(bool)


@pytest.mark.parametrize(("name", "frames"), [("first", 0), ("ref1", 1), ("ref5", 5)])
def test_animation_mask_is_the_originals(contract: dict[str, np.ndarray], name: str, frames: int) -> None:
    variant = KnownVariant(mode="animation", guidance_frames=frames)
    mask = known_mask(None, variant, 77, (2, 3))
    np.testing.assert_array_equal(mask.numpy(), contract[f"mask_anim_{name}"])


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_replacement_mask_is_the_originals(contract: dict[str, np.ndarray], frames: int) -> None:
    variant = KnownVariant(mode="replacement", guidance_frames=frames)
    mask = known_mask(source_mask(contract), variant, 77, (4, 6))
    np.testing.assert_array_equal(mask.numpy(), contract[f"mask_replace_ref{frames}"])
    packed = pack_mask_frames(torch.from_numpy(contract["mask_known_latent_res"][0]), frames)
    assert torch.equal(packed, mask)


def test_reference_slot_has_the_originals_mask(contract: dict[str, np.ndarray]) -> None:
    latents = torch.rand(16, 1, 2, 3)
    condition = join_condition(latents, torch.zeros(4, 20, 2, 3), torch.rand(16, 20, 2, 3))
    np.testing.assert_array_equal(condition[:4, :1].numpy(), contract["mask_ref"])


def test_known_pixels_of_animation_are_grey_behind_the_guidance() -> None:
    frames = torch.rand(3, 9, 16, 16) - 0.5
    known = known_pixels(frames, None, KnownVariant(mode="animation", guidance_frames=5))
    assert torch.equal(known[:, :5], frames[:, :5])
    assert not known[:, 5:].any()
    assert KnownVariant(mode="animation").is_plain
    assert not known_pixels(frames, None, KnownVariant(mode="animation")).any()


def test_known_pixels_of_replacement_hide_the_person_in_black() -> None:
    frames = torch.rand(3, 5, 16, 16) - 0.5
    hidden = np.zeros((5, 16, 16), bool)
    hidden[:, 4:8, 4:8] = True
    known = known_pixels(frames, hidden, KnownVariant(mode="replacement", guidance_frames=1))
    assert torch.equal(known[:, 0], frames[:, 0])
    assert (known[:, 1:, 4:8, 4:8] == -1).all()
    visible = torch.from_numpy(~hidden[1:])
    assert torch.equal(known[:, 1:][:, visible], frames[:, 1:][:, visible])


def test_grown_mask_covers_the_person() -> None:
    mask = np.zeros((2, 40, 40), bool)
    mask[:, 15:25, 18:22] = True
    variant = KnownVariant(mode="replacement", mask_kernel=3, mask_iterations=2, mask_columns=1, mask_rows=1)
    grown = grow_mask(mask, variant)
    assert grown[:, 13:27, 16:24].all()
    assert grown.sum() == 2 * 14 * 8


def test_pixels_are_in_minus_one_to_one() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[1, 2, 3] = (255, 0, 51)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 2, 4, 6) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 1, 2, 3], torch.tensor([1.0, -1.0, -0.6]))


def test_condition_has_the_reference_in_front() -> None:
    reference, known = torch.rand(16, 1, 4, 6), torch.rand(16, 3, 4, 6)
    mask = torch.randint(0, 2, (4, 3, 4, 6)).float()
    condition = join_condition(reference, mask, known)
    assert condition.shape == (20, 4, 4, 6)
    assert (condition[:4, 0] == 1).all()
    assert torch.equal(condition[4:, :1], reference)
    assert torch.equal(condition[:4, 1:], mask)
    assert torch.equal(condition[4:, 1:], known)


def test_draws_reach_every_kind_and_repeat() -> None:
    draws = [draw_known_variant(np.random.default_rng(seed), MODES, 21) for seed in range(200)]
    assert {(draw.mode, draw.guidance_frames) for draw in draws} == {(m, g) for m in MODES for g in (0, 1, 5)}
    replacements = [draw for draw in draws if draw.mode == "replacement"]
    assert {draw.mask_kernel for draw in replacements} == {3, 5, 7, 9}
    assert {draw.mask_iterations for draw in replacements} == {1, 2, 3, 4, 5}
    assert {draw.mask_columns for draw in replacements} == set(range(1, 9))
    assert draws[7] == draw_known_variant(np.random.default_rng(7), MODES, 21)


def test_draws_keep_to_the_clip() -> None:
    rngs = [np.random.default_rng(seed) for seed in range(50)]
    draws = [draw_known_variant(rng, ["animation"], 5) for rng in rngs]
    assert {draw.mode for draw in draws} == {"animation"}
    assert {draw.guidance_frames for draw in draws} == {0, 1}  # five frames of guidance would leave nothing
