"""Canvas sizes, and pictures brought to them."""

import math

import cv2
import numpy as np

from preprocessing.types import WAN, Frames, PreprocessProfile


def canvas_hw(
    hw: tuple[int, int], area: int, divisor: int, *, profile: PreprocessProfile = WAN
) -> tuple[int, int]:
    """Return the largest (height, width) with at most `area` pixels and about the aspect of `hw`.

    Both are multiples of `divisor`. Raises ValueError where nothing is left.
    """
    height, width = hw
    if profile.canvas_rounding == "float_floor":  # order of operations as in Wan2.2 utils.resize_by_area
        free_height = math.sqrt(area / (width / height))
        free_width = area / free_height
        result = int((free_height // divisor) * divisor), int((free_width // divisor) * divisor)
    else:
        result = (
            math.isqrt(area * height // (width * divisor**2)) * divisor,
            math.isqrt(area * width // (height * divisor**2)) * divisor,
        )
    if 0 in result:
        raise ValueError(
            f"a {width}x{height} picture at {area} pixels leaves {result[1]}x{result[0]} "
            f"with sizes divisible by {divisor}: give a larger area"
        )
    return result


def resize_by_area(
    image_rgb: Frames, area: int, divisor: int, *, profile: PreprocessProfile = WAN
) -> Frames:
    """Resize one (H, W, 3) picture to about `area` pixels, sizes divisible by `divisor` (see `canvas_hw`)."""
    height, width = canvas_hw((image_rgb.shape[0], image_rgb.shape[1]), area, divisor, profile=profile)
    shrinks = height * width < image_rgb.shape[0] * image_rgb.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if profile.canvas_fit == "pad":
        return padding_resize(image_rgb, height=height, width=width, interpolation=interpolation)
    return cover_resize(image_rgb, height=height, width=width, interpolation=interpolation)


def padding_resize(
    image_rgb: Frames,
    *,
    height: int,
    width: int,
    color: tuple[int, int, int] = (0, 0, 0),
    interpolation: int = cv2.INTER_LINEAR,
) -> Frames:
    """Fit a picture into height x width, keeping its aspect, and fill the rest with `color`."""
    old_height, old_width = image_rgb.shape[:2]
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = color
    if old_height / old_width > height / width:
        new_height, new_width = height, int(height / old_height * old_width)
    else:
        new_height, new_width = int(width / old_width * old_height), width
    top, left = int((height - new_height) / 2), int((width - new_width) / 2)
    target = canvas[top : top + new_height, left : left + new_width]
    target[:] = cv2.resize(image_rgb, (new_width, new_height), interpolation=interpolation)
    return canvas


def cover_resize(
    image_rgb: Frames, *, height: int, width: int, interpolation: int = cv2.INTER_LINEAR
) -> Frames:
    """Scale a picture until it covers height x width and cut equally off both ends of the longer side."""
    old_height, old_width = image_rgb.shape[:2]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    resized = cv2.resize(image_rgb, (new_width, new_height), interpolation=interpolation)
    return np.ascontiguousarray(resized[top : top + height, left : left + width], np.uint8)
