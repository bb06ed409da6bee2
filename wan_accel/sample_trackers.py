"""Hand drawn videos to the experiment trackers of `report_to`, through the Trainer's own callbacks for them."""

import importlib
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from wan_accel.data.clips import decode_mp4
from wan_accel.sample_files import SampleFiles

logger = logging.getLogger("wan_accel")
_SHEET_TAG, _VIDEO_TAG = "samples/contact_sheet", "samples/{}"


def log_samples(callbacks: Sequence[TrainerCallback], files: SampleFiles, *, step: int) -> list[str]:
    """Log the contact sheet and every video to each tracker that is running; returns the trackers' names.

    Trackers that take no media (MLflow, CSV and the like) are passed over: the files are in the output_dir anyway.
    """
    reached = []
    for callback in callbacks:
        name = type(callback).__name__
        if name in _TRACKERS:
            _TRACKERS[name](callback, files, step)
            reached.append(name)
    return reached


def _tensorboard(callback: Any, files: SampleFiles, step: int) -> None:
    """Videos only where moviepy is installed, without which TensorBoard's writer makes none."""
    writer = callback.tb_writer
    writer.add_image(_SHEET_TAG, np.asarray(Image.open(files.sheet)), step, dataformats="HWC")
    if find_spec("moviepy") is None:
        logger.info("TensorBoard gets the contact sheet only: its videos need `pip install moviepy`")
        return
    for clip, path in files.videos.items():
        frames = decode_mp4(path.read_bytes()).transpose(0, 3, 1, 2)[None]  # (1, T, 3, H, W)
        writer.add_video(_VIDEO_TAG.format(clip), frames, step, fps=files.fps[clip])


def _media(module: str) -> Callable[[Any, SampleFiles, int], None]:
    """wandb and trackio: media objects made from files, and the step as the Trainer's callbacks log it."""

    def log(callback: Any, files: SampleFiles, step: int) -> None:
        library = importlib.import_module(module)
        videos = {_VIDEO_TAG.format(clip): _video(library, path) for clip, path in files.videos.items()}
        library.log({_SHEET_TAG: library.Image(str(files.sheet)), **videos, "train/global_step": step})

    return log


def _video(library: Any, path: Path) -> Any:
    return library.Video(str(path), format="mp4")


_TRACKERS: dict[str, Callable[[Any, SampleFiles, int], None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _media("wandb"),
    "TrackioCallback": _media("trackio"),
}
