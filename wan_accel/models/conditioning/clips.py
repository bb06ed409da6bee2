"""A clip to its tensor columns in the latents dataset: one rank's encoders, and what they make of a row."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from wan_accel.data.cells import tensor_to_cell
from wan_accel.data.clips import Clip
from wan_accel.data.skeleton import draw_poses
from wan_accel.models.conditioning.animate import (
    KnownVariant,
    draw_known_variant,
    grow_mask,
    known_mask,
    known_pixels,
    to_pixels,
)
from wan_accel.models.conditioning.image import first_frame_pixels
from wan_accel.models.denoiser import encode_motion
from wan_accel.models.encoders import ImageEncoder, VideoVae, load_clip, load_motion_encoder, load_vae
from wan_accel.models.variants import FACE_SIZE, Variant

STORED = torch.bfloat16
# Frames go to the device a few at a time: 81 of 512 x 512 as fp32 are 255 MB.
_FACES_AT_ONCE = 16
_NEEDED_BY_ANIMATE = ("reference_rgb", "pose_keypoints", "faces_rgb")


def usable_modes(clip: Clip, modes: Sequence[str]) -> list[str]:
    """The modes that a clip can be trained in: replacement needs a mask.

    Raises:
        ValueError: none.
    """
    usable = [mode for mode in modes if mode != "replacement" or clip.mask is not None]
    if not usable:
        raise ValueError(f"clip {clip.clip_id} has no mode to train (modes {list(modes)}; replacement needs a mask)")
    return usable


class ClipEncoder:
    """The networks that clips need, each loaded when it is first used.

    Latents and CLIP features come out in bf16, motion vectors in fp32, on the CPU.

    Args:
        variant: what is to be trained.
        checkpoint: folder with its VAE and, where the variant needs them, CLIP and the motion encoder.
        known_variants: known-pixel variants to draw for each clip.
        device: where the networks run.
    """

    def __init__(
        self, variant: Variant, checkpoint: Path, *, known_variants: int, device: torch.device | str = "cpu"
    ) -> None:
        self.variant = variant
        self.checkpoint = checkpoint
        self.known_variants = known_variants
        self.device = device

    @cached_property
    def vae(self) -> VideoVae:
        return load_vae(self.checkpoint, self.variant, device=self.device)

    @cached_property
    def clip(self) -> ImageEncoder:
        return load_clip(self.checkpoint, device=self.device)

    @cached_property
    def motion_encoder(self) -> nn.Module:
        return load_motion_encoder(self.checkpoint, self.variant, device=self.device)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of conditions that the variant's clips have."""
        image = ("image",) if "first_frame" in self.variant.conditioning else ()
        animate = ("pose", "reference", "face", "known") if self.variant.has_animate_adapter else ()
        return ("video", *image, *animate)

    def load(self, kinds: Collection[str]) -> None:
        """Load the networks that some kinds need, once: what goes wrong here is not a clip's fault.

        Raises:
            CheckpointError: a file is missing or damaged.
            torch.OutOfMemoryError: the device cannot hold them.
        """
        for kind in kinds:
            for network in self._networks(kind):
                getattr(self, network)

    def _networks(self, kind: str) -> tuple[str, ...]:
        if kind == "face":
            return ("motion_encoder",)
        has_features = kind == "reference" or (kind == "image" and self.variant.dit.clip_dim is not None)
        return ("vae", "clip") if has_features else ("vae",)

    def encode(
        self, clip: Clip, *, modes: Sequence[str] = (), kinds: Collection[str] | None = None
    ) -> dict[str, Any]:
        """The tensor columns of a clip.

        Args:
            clip: what the row holds.
            modes: `animation`, `replacement`: what known variants are drawn from.
            kinds: which kinds of conditions; the variant's by default. Others' columns are left out.

        Raises:
            ValueError: the clip lacks what the variant needs, or its sizes do not fit.
            CheckpointError: a file is missing or damaged.
        """
        self._check_sizes(clip)
        columns: dict[str, Any] = {}
        for kind in self.kinds if kinds is None else kinds:
            columns |= _COLUMNS[kind](self, clip, modes)
        return columns

    def _check_sizes(self, clip: Clip) -> None:
        height, width = clip.frames_rgb.shape[1:3]
        divisor = self.variant.size_divisor
        if height % divisor or width % divisor:
            raise ValueError(
                f"clip {clip.clip_id} is {height}x{width} pixels: {self.variant.name} needs multiples of {divisor}"
            )
        if self.variant.takes_first_frame and len(clip.frames_rgb) == 1:
            raise ValueError(
                f"clip {clip.clip_id} has one frame, which {self.variant.name} is given: nothing is left to predict"
            )
        if not self.variant.has_animate_adapter:
            return
        for name in _NEEDED_BY_ANIMATE:
            if getattr(clip, name) is None:
                raise ValueError(
                    f"clip {clip.clip_id} has no {name.removesuffix('_rgb')}, which {self.variant.name} needs"
                )
        assert clip.reference_rgb is not None and clip.faces_rgb is not None
        if clip.faces_rgb.shape[1:3] != (FACE_SIZE, FACE_SIZE):
            raise ValueError(
                f"clip {clip.clip_id} has faces of {clip.faces_rgb.shape[1]}x{clip.faces_rgb.shape[2]} pixels, "
                f"{self.variant.name} needs {FACE_SIZE}x{FACE_SIZE}: make the clip again"
            )
        for name, hw in (("reference", clip.reference_rgb.shape[:2]), ("canvas of the poses", clip.canvas_hw)):
            if tuple(hw) != (height, width):
                raise ValueError(
                    f"clip {clip.clip_id}: {name} is {hw[0]}x{hw[1]} pixels, its video {height}x{width}: make "
                    "the clip again with --purpose train"
                )

    def _image_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        """The first frame as it is joined to the channels, and its CLIP features where the variant has them."""
        frames = to_pixels(clip.frames_rgb)
        columns = {"image_latents": tensor_to_cell(self.video(first_frame_pixels(frames)))}
        if "clip" in self.variant.conditioning:
            columns["clip_features"] = tensor_to_cell(self.image(frames[:, :1]))
        return columns

    def _video_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        return {"latents": tensor_to_cell(self.video(to_pixels(clip.frames_rgb)))}

    def _pose_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        assert clip.pose_keypoints is not None
        # The poses of all frames make one video as long as the target's: pose latent k is of the same four frames
        # as latent k. (DiffSynth cuts four frames off and so trains on poses that lag behind.)
        pose = to_pixels(draw_poses(clip.pose_keypoints, clip.canvas_hw))
        return {"pose_latents": tensor_to_cell(self.video(pose))}

    def _reference_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        assert clip.reference_rgb is not None
        reference = to_pixels(clip.reference_rgb[None])
        return {
            "reference_latents": tensor_to_cell(self.video(reference)),
            "clip_features": tensor_to_cell(self.image(reference)),
        }

    def _face_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        assert clip.faces_rgb is not None
        return {"motion_vectors": tensor_to_cell(self.motion(clip.faces_rgb))}

    def _known_columns(self, clip: Clip, modes: Sequence[str]) -> dict[str, Any]:
        known = self._known(clip, to_pixels(clip.frames_rgb), modes)
        return {"known": known, "num_known": len(known)}

    def video(self, pixels: Tensor) -> Tensor:
        """(3, T, H, W) in [-1, 1] -> latents (C, F, h, w)."""
        return self.vae.encode(pixels[None].to(self.device))[0].to(STORED).cpu()

    def image(self, pixels: Tensor) -> Tensor:
        """A picture (3, 1, H, W) in [-1, 1] -> CLIP features (257, clip_dim)."""
        return self.clip.encode(pixels.transpose(0, 1).to(self.device))[0].to(STORED).cpu()

    @torch.no_grad()
    def motion(self, faces_rgb: np.ndarray) -> Tensor:
        """(T, 512, 512, 3) uint8 -> motion vectors (T, motion_dim)."""
        chunks = [faces_rgb[start : start + _FACES_AT_ONCE] for start in range(0, len(faces_rgb), _FACES_AT_ONCE)]
        vectors = [encode_motion(self.motion_encoder, to_pixels(chunk)[None].to(self.device)) for chunk in chunks]
        return torch.cat(vectors, dim=1)[0].float().cpu()

    def no_face(self) -> Tensor:
        """The motion vector (1, motion_dim) of a face of all -1, which stands for a dropped one."""
        return self.motion(np.zeros((1, FACE_SIZE, FACE_SIZE, 3), np.uint8))

    def nothing_known(self, num_frames: int, height: int, width: int) -> Tensor:
        """Latents (C, F, h, w) of a mid-grey video: animation of which nothing is known."""
        return self.video(torch.zeros(3, num_frames, height, width))

    def _known(self, clip: Clip, frames: Tensor, modes: Sequence[str]) -> list[dict[str, Any]]:
        """The clip's known variants, drawn from its name and their number; plain animation stores no tensors."""
        usable = usable_modes(clip, modes)
        stride = self.vae.stride
        latent_hw = (frames.shape[2] // stride[1], frames.shape[3] // stride[2])
        rows = []
        for number in range(self.known_variants):
            entropy = [number, xxhash.xxh64(clip.clip_id.encode()).intdigest()]
            variant = draw_known_variant(np.random.default_rng(entropy), usable, len(clip.frames_rgb))
            rows.append({**asdict(variant), **self._known_tensors(clip, frames, variant, latent_hw)})
        return rows

    def _known_tensors(
        self, clip: Clip, frames: Tensor, variant: KnownVariant, latent_hw: tuple[int, int]
    ) -> dict[str, Any]:
        if variant.is_plain:
            return {"latents": None, "mask_bits": None}
        grown = grow_mask(clip.mask, variant) if variant.mode == "replacement" and clip.mask is not None else None
        mask = known_mask(grown, variant, frames.shape[1], latent_hw)
        return {
            "latents": tensor_to_cell(self.video(known_pixels(frames, grown, variant))),
            "mask_bits": np.packbits(mask.numpy().astype(bool)).tobytes(),
        }


# What each kind of condition is encoded by; the order is that of the work.
_COLUMNS: dict[str, Callable[[ClipEncoder, Clip, Sequence[str]], dict[str, Any]]] = {
    "video": ClipEncoder._video_columns,
    "image": ClipEncoder._image_columns,
    "pose": ClipEncoder._pose_columns,
    "reference": ClipEncoder._reference_columns,
    "face": ClipEncoder._face_columns,
    "known": ClipEncoder._known_columns,
}
