"""A clip's columns against encoding by hand; frames of pose and target stay together; clips that cannot be used."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffsynth.pipelines.wan_video import WanVideoUnit_AnimateVideoSplit
from tiny_clips import clip_row

from wan_accel.data.cells import cell_to_tensor
from wan_accel.data.clips import Clip, load_clip
from wan_accel.data.skeleton import draw_poses
from wan_accel.models.conditioning.animate import KnownVariant, grow_mask, known_mask, known_pixels, to_pixels
from wan_accel.models.conditioning.clips import ClipEncoder
from wan_accel.models.encoders import load_clip as load_image_encoder
from wan_accel.models.encoders import load_vae
from wan_accel.models.loading import load_wan
from wan_accel.models.variants import get_variant
from wan_accel.tiny import init_tiny

ANIMATE = get_variant("animate-14b")
MODES = ["animation", "replacement"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "animate"
    init_tiny("animate-14b", folder)
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> ClipEncoder:
    return ClipEncoder(ANIMATE, checkpoint, known_variants=12)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(clip_row(0, num_frames=9))


def test_columns_equal_encoding_by_hand(encoder: ClipEncoder, checkpoint: Path, clip: Clip) -> None:
    columns = encoder.encode(clip, modes=MODES)
    vae = load_vae(checkpoint, ANIMATE)
    pose = draw_poses(clip.pose_keypoints, (48, 32))
    assert pose.any()
    for name, frames in (
        ("latents", clip.frames_rgb), ("reference_latents", clip.reference_rgb[None]), ("pose_latents", pose)
    ):  # fmt: skip
        stored = cell_to_tensor(columns[name])
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, vae.encode(to_pixels(frames)[None])[0].to(torch.bfloat16)), name
    assert cell_to_tensor(columns["latents"]).shape == (16, 3, 6, 4)
    reference = to_pixels(clip.reference_rgb[None])[:, 0][None]
    features = load_image_encoder(checkpoint).encode(reference)[0].to(torch.bfloat16)
    assert torch.equal(cell_to_tensor(columns["clip_features"]), features)
    with torch.no_grad():
        denoiser = load_wan("animate-14b", checkpoint, with_motion_encoder=True)
        motion = denoiser.encode_motion(to_pixels(clip.faces_rgb)[None])[0]
    torch.testing.assert_close(cell_to_tensor(columns["motion_vectors"]), motion, rtol=1e-5, atol=1e-6)


def test_known_variants_hold_what_they_say(encoder: ClipEncoder, clip: Clip) -> None:
    columns = encoder.encode(clip, modes=MODES)
    assert columns["num_known"] == len(columns["known"]) == 12
    assert {row["mode"] for row in columns["known"]} == set(MODES)
    frames = to_pixels(clip.frames_rgb)
    names = {field.name for field in dataclasses.fields(KnownVariant)}
    for row in columns["known"]:
        variant = KnownVariant(**{name: row[name] for name in names})
        if variant.is_plain:
            assert row["latents"] is None and row["mask_bits"] is None
            continue
        grown = grow_mask(clip.mask, variant) if variant.mode == "replacement" else None
        expected = encoder.video(known_pixels(frames, grown, variant))
        assert torch.equal(cell_to_tensor(row["latents"]), expected)
        bits = np.unpackbits(np.frombuffer(row["mask_bits"], np.uint8), count=4 * 3 * 6 * 4)
        np.testing.assert_array_equal(bits.reshape(4, 3, 6, 4), known_mask(grown, variant, 9, (6, 4)).numpy())


def test_known_variants_repeat_and_differ_between_clips(encoder: ClipEncoder, clip: Clip) -> None:
    def drawn(some: Clip) -> list[tuple]:
        return [
            (row["mode"], row["guidance_frames"], row["mask_rows"])
            for row in encoder.encode(some, modes=MODES)["known"]
        ]

    assert drawn(clip) == drawn(clip) != drawn(dataclasses.replace(clip, clip_id="another"))


@pytest.mark.parametrize(("first_moved", "latent"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_pose_latents_change_with_the_targets(encoder: ClipEncoder, first_moved: int, latent: int) -> None:
    """A jump from video frame n on shows in the same latent frame of target and pose: no lag."""
    row = clip_row(0, num_frames=9)
    still = load_clip(row)
    pose, frames = still.pose_keypoints.copy(), still.frames_rgb.copy()
    pose[:], frames[:] = pose[:1], frames[:1]
    still = dataclasses.replace(still, pose_keypoints=pose, frames_rgb=frames)
    pose, frames = pose.copy(), frames.copy()
    pose[first_moved:, :8, 0] += 9
    frames[first_moved:, :, 9:] = frames[first_moved:, :, :-9].copy()
    moved = dataclasses.replace(still, pose_keypoints=pose, frames_rgb=frames)
    before, after = (encoder.encode(some, modes=MODES) for some in (still, moved))
    for name in ("latents", "pose_latents"):
        difference = (cell_to_tensor(after[name]).float() - cell_to_tensor(before[name]).float()).abs().amax((0, 2, 3))
        assert (difference[:latent] == 0).all() and (difference[latent:] > 0.05).all(), (name, difference)


def marker_columns(latents: torch.Tensor, black: torch.Tensor) -> list[int]:
    """The column of each latent frame (C, F, h, w) that differs most from the latents of a black video."""
    difference = latents.float() - black[:, : latents.shape[1]].float()
    return difference.square().sum(dim=(0, 2)).argmax(dim=1).tolist()


def test_moving_marker_is_at_the_same_place_in_pose_and_target(encoder: ClipEncoder) -> None:
    """What the denoiser pairs (target latent k, pose latent k) shows the marker at the same place in every frame.

    diffsynth pairs pose latent k - 1 with target latent k of the same video: its marker is a step behind.
    """
    clip = load_clip(clip_row(0, num_frames=13, hw=(32, 128)))
    frames, pose = np.zeros((13, 32, 128, 3), np.uint8), clip.pose_keypoints.copy()
    step = (np.arange(13) + 3) // 4  # of the latent frame that a frame is in
    for frame, left in enumerate(24 + 24 * step):
        frames[frame, 4:28, left : left + 8] = 255
        pose[frame, :8, 0] = left + 4
        pose[frame, :8, 1] = np.linspace(4, 28, 8)
    columns = encoder.encode(dataclasses.replace(clip, frames_rgb=frames, pose_keypoints=pose), modes=MODES)
    black = encoder.video(-torch.ones(3, 13, 32, 128))
    target, posed = (marker_columns(cell_to_tensor(columns[name]), black) for name in ("latents", "pose_latents"))
    assert np.diff(target).tolist() == np.diff(posed).tolist() == [3, 3, 3]  # columns a latent frame
    assert np.abs(np.subtract(target, posed)).max() <= 1  # a bar and thin lines
    unit = WanVideoUnit_AnimateVideoSplit()
    split = unit.process(None, list(frames), list(draw_poses(pose, (32, 128))), None, None, None)
    theirs = marker_columns(encoder.video(to_pixels(np.stack(split["animate_pose_video"]))), black)
    assert theirs == posed[:-1]  # and these are added to latent frames 1.., a step further on


def test_text_to_video_needs_no_more_than_the_video(tmp_path: Path, clip: Clip) -> None:
    init_tiny("t2v-1.3b", tmp_path / "t2v")
    encoder = ClipEncoder(get_variant("t2v-1.3b"), tmp_path / "t2v", known_variants=4)
    bare = dataclasses.replace(clip, reference_rgb=None, pose_keypoints=None, faces_rgb=None, mask=None)
    columns = encoder.encode(bare)
    assert columns.keys() == {"latents"} and columns["latents"]["shape"] == [16, 3, 6, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faces_rgb": None}, "square0 has no faces, which animate-14b needs"),
        ({"pose_keypoints": None}, "square0 has no pose_keypoints"),
        ({"faces_rgb": np.zeros((9, 256, 256, 3), np.uint8)}, "faces of 256x256 pixels, animate-14b needs 512x512"),
        ({"canvas_hw": (64, 64)}, "canvas of the poses is 64x64 pixels, its video 48x32"),
        ({"reference_rgb": np.zeros((32, 32, 3), np.uint8)}, "reference is 32x32 pixels, its video 48x32"),
        ({"frames_rgb": np.zeros((9, 40, 32, 3), np.uint8)}, "is 40x32 pixels: animate-14b needs multiples of 16"),
        ({"frames_rgb": np.zeros((8, 48, 32, 3), np.uint8)}, r"got 8 frames .* give 4n\+1 frames"),
    ],
)
def test_clips_that_cannot_be_used(encoder: ClipEncoder, clip: Clip, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.encode(dataclasses.replace(clip, **changes), modes=MODES)


def test_replacement_without_a_mask(encoder: ClipEncoder, clip: Clip) -> None:
    unmasked = dataclasses.replace(clip, mask=None)
    assert {row["mode"] for row in encoder.encode(unmasked, modes=MODES)["known"]} == {"animation"}
    with pytest.raises(ValueError, match=r"no mode to train .* replacement needs a mask"):
        encoder.encode(unmasked, modes=["replacement"])
