"""Conditions that training encodes itself: what a worker reads and draws for them, as raw pixels and text.

Tensors are named live_* and leave the micro-batch again where they are encoded (`models.conditioning.live`):
    live_frames (T, H, W, 3) uint8, augmented;  live_caption (N,) uint8, UTF-8 behind which zeros may follow;
    live_known (T, H, W) uint8, one of HIDDEN, VISIBLE, GREY;  live_mask (4, F, h, w) uint8, 1 = known.
"""

import importlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wan_accel.data.cells import LatentsError
from wan_accel.data.clips import Clip, load_clip
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.rows import Rows
from wan_accel.data.schema import CLIPS_SCHEMA
from wan_accel.models.conditioning.animate import KnownVariant, draw_known_variant, grow_mask, known_mask
from wan_accel.models.conditioning.clips import usable_modes
from wan_accel.step_plan import DatasetIndex, SampleDraw

HIDDEN, VISIBLE, GREY = range(3)
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
AugmentCaption = Callable[[str, np.random.Generator], str]
# Streams of random numbers of a draw; the draw's noise seed is a function of (seed, row, epoch).
_FRAMES, _CAPTION, _KNOWN = range(3)


def horizontal_flip(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror a clip (T, H, W, 3) half of the times. Not for Animate, whose poses would not follow."""
    return frames[:, :, ::-1] if rng.random() < 0.5 else frames


_BUILT_IN = {"horizontal_flip": horizontal_flip}


def load_hook(name: str, key: str) -> Callable:
    """The function that a recipe names as `package.module:function`, or a built-in.

    Raises:
        ValueError: it cannot be imported; `key` is where it was named.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}={name} cannot be imported ({error}): write package.module:function, importable from where you "
            f"launch, or {', '.join(_BUILT_IN)}"
        ) from None
    if not callable(hook):
        raise ValueError(f"{key}={name} is not a function")
    return hook


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
        LatentsError: clips are missing.
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
        self._clips = Rows(clips, CLIPS_SCHEMA, light=["clip_id"])
        rows = {name: row for row, name in enumerate(self._clips.table["clip_id"].to_pylist())}
        missing = [name for name in cached.clip_ids if name not in rows]
        if missing:
            raise LatentsError(
                f"data.on_the_fly: data.clips={clips} does not have {len(missing)} clips of {cached.root} (the first: "
                f"{missing[0]}): give the dataset that was cached"
            )
        self._rows = [rows[name] for name in cached.clip_ids]

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
        row = self._clips[self._rows[index]]
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
        return caption if self._augment_caption is None else self._augment_caption(caption, _generator(draw, _CAPTION))

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
