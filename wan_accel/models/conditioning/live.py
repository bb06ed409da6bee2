"""Raw pixels and captions of a micro-batch to the denoiser's inputs, on the training device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_accel.data.live import GREY, HIDDEN
from wan_accel.models.conditioning.clips import STORED
from wan_accel.models.encoders import TextEncoder, VideoVae


class LiveEncoder:
    """Replaces the cached tensors of a micro-batch by fresh ones, where it holds live_* tensors (`data.live`).

    Args:
        vae: for frames, None if no kind needs it.
        text_encoder: for captions; split over all ranks, every rank must encode equally often.
        encodes_video: whether frames become `latents`; otherwise they only serve what is known of them.
        reference_frames: latent frames in front of the video's own, which stay as they were cached.
    """

    def __init__(
        self,
        vae: VideoVae | None,
        text_encoder: TextEncoder | None,
        *,
        encodes_video: bool,
        reference_frames: int,
    ) -> None:
        self.vae = vae
        self.encodes_video = encodes_video
        self.text_encoder = text_encoder
        self.reference_frames = reference_frames

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `latents`, `condition` and `text` encoded anew, rounded as the cache rounds them."""
        live = {name: value for name, value in batch.items() if name.startswith("live_")}
        batch = {name: value for name, value in batch.items() if name not in live}
        if "live_caption" in live:
            batch["text"] = self._texts(live["live_caption"])
        if "live_known" in live:
            known = self._videos(_known_pixels(live["live_frames"], live["live_known"]))
            fresh = torch.cat([live["live_mask"].to(known.dtype), known], dim=1)
            batch["condition"] = self._behind_reference(batch["condition"], fresh)
        if "live_frames" in live and self.encodes_video:
            batch["latents"] = self._behind_reference(batch["latents"], self._videos(_pixels(live["live_frames"])))
        return batch

    def _behind_reference(self, cached: Tensor, fresh: Tensor) -> Tensor:
        return torch.cat([cached[:, :, : self.reference_frames], fresh.to(cached.dtype)], dim=2)

    def _videos(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, F, h, w), one at a time: the VAE's activations are what fills the memory."""
        assert self.vae is not None
        return torch.cat([self.vae.encode(video[None]) for video in pixels]).to(STORED)

    def _texts(self, captions: Tensor) -> Tensor:
        assert self.text_encoder is not None
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in captions.cpu()]
        states = self.text_encoder.encode(texts)
        longest = max(map(len, states))
        return torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states]).to(STORED)


def _pixels(frames: Tensor) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) fp32 in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _known_pixels(frames: Tensor, known: Tensor) -> Tensor:
    """What is known of the frames: hidden pixels black, unknown ones mid grey."""
    pixels, known = _pixels(frames), known[:, None]
    return torch.where(known == HIDDEN, -1.0, torch.where(known == GREY, 0.0, pixels))
