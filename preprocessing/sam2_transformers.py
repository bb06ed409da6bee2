"""Masks by transformers' `Sam2VideoModel`; imported where it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Sam2VideoModel, Sam2VideoProcessor

from preprocessing.masks import Mask
from preprocessing.prompts import FramePrompt
from preprocessing.types import Frames
from preprocessing.video_segmenter import fill_small_holes

_PERSON = 1


class Sam2TransformersPropagator:
    """A SAM2 folder of transformers on frames in memory, one person at a time."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Open a folder with `config.json`, weights and processor. Raises ValueError for any other folder."""
        self._device = torch.device(device)
        try:
            self._processor: Any = Sam2VideoProcessor.from_pretrained(folder, local_files_only=True)
            opened: Any = Sam2VideoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder}: not a folder of a transformers Sam2VideoModel ({str(error).splitlines()[0]})"
            ) from error
        model, info = opened
        # transformers fills what a folder lacks with random numbers.
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{folder}: lacks weights of a Sam2VideoModel, {missing}")
        self._model: Any = model.to(self._device).eval()

    def __call__(self, frames_rgb: Frames, prompts: Sequence[FramePrompt], first_mask: Mask | None) -> Mask:
        """Return (T, H, W) masks, forwards from the first frame that is known, then backwards from it."""
        height, width = frames_rgb.shape[1:3]
        with torch.inference_mode():
            session = self._processor.init_video_session(inference_device=self._device, dtype=torch.float32)
            session.processed_frames = LazyFrames(frames_rgb, self._processor.video_processor)
            session.video_height, session.video_width = height, width
            if first_mask is not None:
                self._add(session, 0, input_masks=first_mask)
            for prompt in prompts:
                self._add(session, prompt.frame, **_inputs(prompt))
            first = 0 if first_mask is not None else min(prompt.frame for prompt in prompts)
            masks = np.zeros(frames_rgb.shape[:3], bool)
            for reverse in (False, True) if first > 0 else (False,):
                for output in self._model.propagate_in_video_iterator(session, start_frame_idx=first, reverse=reverse):
                    masks[output.frame_idx] = _in_video(output.pred_masks, (height, width))
        return masks

    def _add(self, session: Any, frame: int, **inputs: Any) -> None:
        self._processor.add_inputs_to_inference_session(session, frame_idx=frame, obj_ids=_PERSON, **inputs)
        self._model(session, frame_idx=frame)  # makes it a frame that the others are compared with


class LazyFrames:
    """Frames as the network sees them, made when it looks: a clip at 1024 pixels a side would fill gigabytes."""

    def __init__(self, frames_rgb: Frames, processor: Any) -> None:
        self._frames, self._processor = frames_rgb, processor

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, frame: int) -> Tensor:
        """(3, S, S) float32, scaled and normalised as the folder's processor says."""
        video = torch.from_numpy(self._frames[frame].transpose(2, 0, 1).copy())[None]
        pixels = self._processor(videos=[video], return_tensors="pt").pixel_values_videos
        return pixels[0, 0]


def _inputs(prompt: FramePrompt) -> dict[str, Any]:
    """Prompts nested as transformers wants them: picture, object, point."""
    inputs: dict[str, Any] = {}
    if len(prompt.points_xy):
        inputs["input_points"] = [[prompt.points_xy.tolist()]]
        inputs["input_labels"] = [[prompt.on_person.astype(int).tolist()]]
    if prompt.box_xyxy is not None:
        inputs["input_boxes"] = [[prompt.box_xyxy.tolist()]]
    return inputs


def _in_video(scores: Tensor, hw: tuple[int, int]) -> Mask:
    """The network's scores (1, 1, h, w) as a mask of the video's size."""
    filled = torch.from_numpy(fill_small_holes(scores[0, 0].float().cpu().numpy()))[None, None]
    return np.asarray(torch.nn.functional.interpolate(filled, hw, mode="bilinear")[0, 0].numpy() > 0)
