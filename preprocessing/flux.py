"""Pictures edited by FLUX.1-Kontext, as Wan2.2-Animate does for two-step retargeting."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.types import Frames

_PIPELINE = "FluxKontextPipeline"
_GUIDANCE, _NUM_STEPS = 2.5, 28  # Wan2.2's


class FluxKontextEditor:
    """A diffusers `FluxKontextPipeline`, opened at its first picture: it is large, and pictures may all be given."""

    def __init__(self, folder: Path, *, device: str = "cpu", seed: int = 0, num_steps: int = _NUM_STEPS) -> None:
        """folder: as `check_flux_folder` wants it. seed: another one gives other pictures."""
        check_flux_folder(folder)
        self._folder, self._device, self._seed, self._num_steps = folder, device, seed, num_steps
        self._pipeline: Any = None

    @property
    def identity(self) -> str:
        """The folder's content, the seed and the number of steps."""
        return f"{identity_of_flux(self._folder)} {self._seed} {self._num_steps}"

    def __call__(self, picture_rgb: Frames, prompt: str) -> Frames:
        """Redraw (H, W, 3); the result has the pipeline's own size, about a megapixel of the same aspect."""
        import torch

        if self._pipeline is None:
            from diffusers import FluxKontextPipeline

            dtype = torch.float32 if self._device == "cpu" else torch.bfloat16
            self._pipeline = FluxKontextPipeline.from_pretrained(
                self._folder, torch_dtype=dtype, local_files_only=True
            ).to(self._device)
            self._pipeline.set_progress_bar_config(disable=True)
        result = self._pipeline(
            image=Image.fromarray(picture_rgb),
            prompt=prompt,
            height=picture_rgb.shape[0],
            width=picture_rgb.shape[1],
            guidance_scale=_GUIDANCE,
            num_inference_steps=self._num_steps,
            generator=torch.Generator("cpu").manual_seed(self._seed),
        )
        return np.asarray(result.images[0].convert("RGB"))


def check_flux_folder(folder: Path) -> None:
    """Raise ValueError unless a folder holds a FLUX.1-Kontext pipeline and diffusers is installed."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--flux {folder}: no pipeline of diffusers ({error}); get one with: "
            f"hf download black-forest-labs/FLUX.1-Kontext-dev --local-dir {folder}"
        ) from None
    if index.get("_class_name") != _PIPELINE:
        raise ValueError(f"--flux {folder}: a {index.get('_class_name')}, expected a {_PIPELINE} (FLUX.1-Kontext-dev)")
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise ValueError("--flux needs diffusers: pip install 'wan-accel[flux]'") from None


def identity_of_flux(folder: Path) -> str:
    """Tell a pipeline by its configuration and the sizes of its weights, which are too large to hash at a start."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    listed = [
        (str(path.relative_to(folder)), path.read_text() if path.suffix == ".json" else path.stat().st_size)
        for path in files
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()
