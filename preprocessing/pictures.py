"""Single pictures: read, and measured."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from preprocessing.types import Frames, PoseMetas

Measure = Callable[[Frames], PoseMetas | None]
"""Measures the main person of one picture (H, W, 3); None where there is nobody."""


def load_picture(path: str) -> Frames:
    """Read a picture as RGB (H, W, 3); raises ValueError for anything else."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"reference {path}: not a picture ({error})") from None
