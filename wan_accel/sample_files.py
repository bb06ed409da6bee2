"""Decode drawn latents and write them: an mp4 a clip, and a contact sheet beside the ground truth."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wan_accel.data import store
from wan_accel.data.clips import decode_mp4
from wan_accel.data.latents import ClipInfo
from wan_accel.data.schema import CLIPS_SCHEMA
from wan_accel.models.encoders import VideoVae, load_vae
from wan_accel.models.variants import Variant
from wan_accel.sample_sheet import SheetClip, columns_of, sample_sheet

SHEET = "contact_sheet.png"
_BT601, _LIMITED_RANGE = 6, 1  # numbers of ITU-T H.273


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFiles:
    """What was written: the contact sheet, and by the clip's name its mp4 and frames a second."""

    sheet: Path
    videos: dict[str, Path]
    fps: dict[str, float]


class SampleWriter:
    """Turns latents into files, on one process.

    The VAE is loaded once, in fp32 as Wan runs it, and is on the device only while it decodes.

    Args:
        variant: whose VAE, and how fast its videos run.
        checkpoint: folder with the VAE.
        folder: what to write below: `step-N/`, and `ground-truth/` once.
        device: where to decode.
        clips: the clips dataset, for ground truth from its frames; None decodes the cached latents.
    """

    def __init__(
        self, variant: Variant, checkpoint: Path, folder: Path, *, device: torch.device, clips: Path | None = None
    ) -> None:
        self.variant = variant
        self.checkpoint = checkpoint
        self.folder = folder
        self.device = device
        self.clips = clips
        self._vae: VideoVae | None = None
        self._truth: dict[str, np.ndarray] = {}  # the frames that sheets show

    def write(self, name: str, drawn: Sequence[tuple[ClipInfo, Tensor, Tensor]], *, title: str) -> SampleFiles:
        """Write `<folder>/<name>`, which appears when it is complete.

        Args:
            name: e.g. `step-500`.
            drawn: of each clip its name, drawn latents and cached latents (C, F, h, w), without a reference slot.
            title: of the contact sheet.
        """
        final, temporary = self.folder / name, self.folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sheet_clips, videos = [], {}
        with self._decoder() as vae:
            for info, latents, cached in drawn:
                frames = to_frames(vae.decode(latents[None])[0])
                video = f"{_file_stem(info.name)}.mp4"
                write_mp4(temporary / video, frames, info.fps)
                videos[info.name] = final / video
                sheet_clips.append(_sheet_clip(info, frames, self._ground_truth(info, cached, vae)))
        sample_sheet(sheet_clips, title=title, label=name.replace("-", " ")).save(temporary / SHEET)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        fps = {info.name: info.fps for info, _, _ in drawn}
        return SampleFiles(sheet=final / SHEET, videos=videos, fps=fps)

    @contextmanager
    def _decoder(self) -> Iterator[VideoVae]:
        if self._vae is None:
            self._vae = load_vae(self.checkpoint, self.variant)
        try:
            self._vae.model.to(self.device)
            yield self._vae
        finally:
            self._vae.model.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _ground_truth(self, info: ClipInfo, cached: Tensor, vae: VideoVae) -> np.ndarray:
        """The frames that sheets show of a clip; the first time its video is written as well."""
        if info.name not in self._truth:
            frames = self._frames_of(info.clip_id) if self.clips is not None else to_frames(vae.decode(cached[None])[0])
            path = self.folder / "ground-truth" / f"{_file_stem(info.name)}.mp4"
            path.parent.mkdir(exist_ok=True)
            write_mp4(path, frames, info.fps)
            self._truth[info.name] = frames[columns_of(len(frames))]
        return self._truth[info.name]

    def _frames_of(self, clip_id: str) -> np.ndarray:
        assert self.clips is not None
        clips = store.load(self.clips, CLIPS_SCHEMA)
        names = list(clips.select_columns(["clip_id"])["clip_id"])
        if clip_id not in names:
            raise ValueError(
                f"data.clips={self.clips} has no clip {clip_id}: set validation.sample.ground_truth=latents"
            )
        return decode_mp4(clips.select_columns(["video"])[names.index(clip_id)]["video"]["bytes"])


def _sheet_clip(info: ClipInfo, frames: np.ndarray, truth: np.ndarray) -> SheetClip:
    columns = columns_of(len(frames))
    return SheetClip(
        name=info.name,
        caption=info.caption,
        moments=tuple((columns / info.fps).tolist()),
        truth=truth,
        sample=frames[columns],
    )


def _file_stem(name: str) -> str:
    """A clip's name for a file, another one for every name: what a file system may not take becomes `%` and hex."""
    return re.sub(r"[^\w.-]", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


def to_frames(pixels: Tensor) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path: Path, frames_rgb: np.ndarray, fps: float) -> None:
    """Write (T, H, W, 3) uint8 frames as H.264 that browsers and trackers play (4:2:0, CRF 14, index in front)."""
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1_000_000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "veryfast"})
        stream.height, stream.width = frames_rgb.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Say what the conversion from RGB uses, or players guess BT.709 for large pictures and shift colours.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        for frame in frames_rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
