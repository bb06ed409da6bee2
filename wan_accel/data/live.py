"""Conditions that training encodes itself: what a worker reads and draws for them, as raw pixels and text.

Tensors are named live_* and leave the micro-batch again where they are encoded (`models.conditioning.live`):
    live_frames (T, H, W, 3) uint8, augmented;  live_caption (N,) uint8, UTF-8 behind which zeros may follow;
    live_known (T, H, W) uint8, one of HIDDEN, VISIBLE, GREY;  live_mask (4, F, h, w) uint8, 1 = known.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wan_accel.data.clips import Clip, load_clip
from wan_accel.data.hooks import Augment, AugmentCaption
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.provenance import COMPARED, rows_of_clips
from wan_accel.data.rows import Rows
from wan_accel.data.schema import CLIPS_SCHEMA
from wan_accel.draws import DatasetIndex, SampleDraw
from wan_accel.models.conditioning.animate import KnownVariant, draw_known_variant, grow_mask, known_mask
from wan_accel.models.conditioning.clips import usable_modes

HIDDEN, VISIBLE, GREY = range(3)
# Streams of random numbers of a draw; the draw's noise seed is a function of (seed, row, epoch).
_FRAMES, _CAPTION, _KNOWN = range(3)


class LiveSource:
    """Cached samples plus what is to be encoded anew of their clips.

    Args:
        cached: the latents folder, with every condition: shapes, and what is not encoded anew, come from there.
        clips: the clips dataset that it was made of.
        kinds: of `video`, `text`, `known`.
        augment: a pure function of (frames (T, H, W, 3) uint8, generator) to frames of the same shape.
        augment_caption: a pure function of (caption, generator) to a caption.
        captions: captions by clip_id in place of the clips' own.

    Raises:
        LatentsError: clips are missing, or others than those that were cached.
    """

    def __init__(
        self,
        cached: LatentsDataset,
        clips: Path,
        *,
        kinds: Collection[str],
        augment: Augment | None = None,
        augment_caption: AugmentCaption | None = None,
        captions: dict[str, str] | None = None,
    ) -> None:
        self.cached = cached
        self.kinds = frozenset(kinds)
        self._augment = augment
        self._augment_caption = augment_caption
        self._captions = captions or {}
        self._clips = Rows(clips, CLIPS_SCHEMA, light=COMPARED)
        self._rows = rows_of_clips(cached, self._clips)

    def try_first(self) -> None:
        """Make a sample, so that a hook or a clip that cannot be used is found before training.

        Raises:
            ValueError: what is wrong with it.
        """
        self.sample(0, SampleDraw(index=0, epoch=0, sigma=0.5, noise_seed=0))

    @property
    def keys(self) -> dict[str, str]:
        """Those of the cached conditions."""
        return self.cached.keys

    def index(self) -> DatasetIndex:
        """That of the cached conditions."""
        return self.cached.index()

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """The cached sample with live_* tensors; equal for equal draws, whatever the worker.

        Raises:
            ValueError: the clip cannot be decoded or used, or a hook changed its shape; the clip is named.
        """
        sample = self.cached.sample(index, draw)
        row = self._clips[int(self._rows[index])]
        if "text" in self.kinds:
            own = self._captions.get(row["clip_id"], row["caption"] or "")
            sample["live_caption"] = _encode_utf8("" if draw.drop_caption else self._caption(own, draw))
        if self.kinds & {"video", "known"}:
            clip = load_clip(row)
            sample["live_frames"] = torch.from_numpy(np.ascontiguousarray(self._frames(clip, draw)))
            if "known" in self.kinds:
                variant = self.known_variant(clip, row.get("modes") or [], draw)
                sample |= _known_tensors(clip, variant, sample["latents"].shape[2:])
        return sample

    def known_variant(self, clip: Clip, modes: list[str], draw: SampleDraw) -> KnownVariant:
        """The variant of a draw: `draw_known_variant` over the clip's modes, anew in every epoch."""
        return draw_known_variant(_generator(draw, _KNOWN), usable_modes(clip, modes), len(clip.frames_rgb))

    def _caption(self, caption: str, draw: SampleDraw) -> str:
        if self._augment_caption is None:
            return caption
        changed = self._augment_caption(caption, _generator(draw, _CAPTION))
        if not isinstance(changed, str):
            found = type(changed).__name__
            raise ValueError(f"data.augment_caption made {found} of {caption!r:.60}: it must return str")
        return changed

    def _frames(self, clip: Clip, draw: SampleDraw) -> np.ndarray:
        if self._augment is None:
            return clip.frames_rgb
        frames = self._augment(clip.frames_rgb.copy(), _generator(draw, _FRAMES))
        if not isinstance(frames, np.ndarray) or (frames.shape, frames.dtype) != (clip.frames_rgb.shape, np.uint8):
            found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(
                f"data.augment made {found} of clip {clip.clip_id}: it must return uint8 {clip.frames_rgb.shape}, as "
                "it was given"
            )
        return frames


def _generator(draw: SampleDraw, purpose: int) -> np.random.Generator:
    return np.random.default_rng([draw.noise_seed, purpose])


def _encode_utf8(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)


def _known_tensors(clip: Clip, variant: KnownVariant, latent_size: torch.Size) -> dict[str, Tensor]:
    """What is known of each pixel, and the mask channels; see `known_pixels` and `known_mask`."""
    grown = grow_mask(clip.mask, variant) if variant.mode == "replacement" and clip.mask is not None else None
    shape = clip.frames_rgb.shape[:3]
    known = np.full(shape, GREY, np.uint8) if grown is None else np.where(grown, HIDDEN, VISIBLE).astype(np.uint8)
    known[: variant.guidance_frames] = VISIBLE
    mask = known_mask(grown, variant, shape[0], (latent_size[0], latent_size[1]))
    return {"live_known": torch.from_numpy(known), "live_mask": mask.to(torch.uint8)}
