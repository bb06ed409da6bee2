"""Masks by the video predictor of the `sam2` package; imported where it is asked for."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sam2.sam2_video_predictor
import torch
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor
from tqdm import tqdm

from preprocessing.masks import Mask
from preprocessing.prompts import FramePrompt
from preprocessing.types import Frames
from preprocessing.video_segmenter import fill_small_holes

_MEAN_RGB, _STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PERSON = 1
_SIZES = {(96, 12): "t", (96, 16): "s", (112, 24): "b+", (144, 48): "l"}  # (width, blocks) of the image encoder

# A clip is a propagation; its progress bar would scroll past for each.
sam2.sam2_video_predictor.tqdm = partial(tqdm, disable=True)


class Sam2Propagator:
    """SAM2's video predictor on frames in memory, one person at a time."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu", image_pixels: int | None = None) -> None:
        """Open a released checkpoint (.pt); its size and version are told by its weights.

        image_pixels: side of the square that the network sees; by default the released 1024. Raises ValueError for
        any other file.
        """
        overrides = ["++model._target_=preprocessing.sam2_video.HolelessPredictor"]
        if image_pixels is not None:
            overrides.append(f"++model.image_size={image_pixels}")
        overrides += [
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
            "++model.binarize_mask_from_pts_for_mem_enc=true",
        ]
        self._predictor: Any = build_sam2_video_predictor(
            _config_of(checkpoint), str(checkpoint), device=device, apply_postprocessing=False,
            hydra_overrides_extra=overrides,
        )  # fmt: skip

    def __call__(self, frames_rgb: Frames, prompts: Sequence[FramePrompt], first_mask: Mask | None) -> Mask:
        """Return (T, H, W) masks, forwards from the first frame that is known, then backwards from it."""
        predictor = self._predictor
        with torch.inference_mode():
            state = self._new_state(frames_rgb)
            if first_mask is not None:
                predictor.add_new_mask(state, 0, _PERSON, first_mask)
            for prompt in prompts:
                predictor.add_new_points_or_box(
                    state, prompt.frame, _PERSON, points=prompt.points_xy.astype(np.float32),
                    labels=prompt.on_person.astype(np.int32), box=prompt.box_xyxy,
                )  # fmt: skip
            first = 0 if first_mask is not None else min(prompt.frame for prompt in prompts)
            masks = np.zeros(frames_rgb.shape[:3], bool)
            for reverse in (False, True) if first > 0 else (False,):
                for frame, _, scores in predictor.propagate_in_video(state, start_frame_idx=first, reverse=reverse):
                    masks[frame] = (scores[0, 0] > 0).cpu().numpy()
        return masks

    def _new_state(self, frames_rgb: Frames) -> dict[str, Any]:
        """What `init_state` gives, without files: it loads a video or JPEGs, and all of them at once."""
        predictor = self._predictor
        per_object = ("point_inputs", "mask_inputs", "output_dict", "temp_output_dict", "frames_tracked")
        return {
            "images": LazyFrames(frames_rgb, image_pixels=predictor.image_size),
            "num_frames": len(frames_rgb),
            "video_height": frames_rgb.shape[1],
            "video_width": frames_rgb.shape[2],
            "device": predictor.device,
            "storage_device": predictor.device,
            "offload_video_to_cpu": True,
            "offload_state_to_cpu": False,
            "cached_features": {},
            "constants": {},
            "obj_id_to_idx": {},
            "obj_idx_to_id": {},
            "obj_ids": [],
            **{f"{name}_per_obj": {} for name in per_object},
        }


class HolelessPredictor(SAM2VideoPredictor):
    """Fills small holes on any device, where the package needs its CUDA extension."""

    def _run_single_frame_inference(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Tensor]:
        output, scores = super()._run_single_frame_inference(*args, **kwargs)
        filled = fill_small_holes(scores[0, 0].float().cpu().numpy())
        scores = torch.from_numpy(filled)[None, None].to(scores.device, scores.dtype)
        output["pred_masks"] = scores.to(output["pred_masks"].device)
        return output, scores


class LazyFrames:
    """Frames as the network sees them, made when it looks: a clip at 1024 pixels a side would fill gigabytes."""

    def __init__(self, frames_rgb: Frames, *, image_pixels: int) -> None:
        self._frames, self._size = frames_rgb, (image_pixels, image_pixels)
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (_MEAN_RGB, _STD_RGB))

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, frame: int) -> Tensor:
        """(3, S, S) float32, scaled with PIL's default filter as sam2 does with JPEG files."""
        picture = np.array(Image.fromarray(self._frames[frame]).resize(self._size))
        # sam2 divides in float64 before it stores float32.
        pixels = torch.from_numpy(picture / 255.0).permute(2, 0, 1).float()
        return (pixels - self._mean) / self._std


def _config_of(checkpoint: Path) -> str:
    """Name the configuration of a checkpoint. Raises ValueError for a file that is none."""
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["model"]
        width = len(weights["image_encoder.trunk.patch_embed.proj.weight"])
    except Exception as error:  # pickle, zip and key errors of any kind
        raise ValueError(f"{checkpoint}: not a SAM2 checkpoint ({type(error).__name__}: {error})") from error
    blocks = {name.split(".")[3] for name in weights if name.startswith("image_encoder.trunk.blocks.")}
    size = _SIZES.get((width, len(blocks)))
    if size is None:
        raise ValueError(
            f"{checkpoint}: a SAM2 of {len(blocks)} blocks of width {width} is none of those released (tiny, small, "
            "base+, large)"
        )
    version = "2.1" if "no_obj_embed_spatial" in weights else "2"
    return f"configs/sam{version}/sam{version}_hiera_{size}.yaml"
