"""How masks grow before they are used, under the names that Wan2.2's preprocess_data.py gives the numbers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_accel.data.masks import Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskGrowth:
    """`iterations` of dilation by a square of `k` pixels, then blocks.

    A block is one of `w_len` x `h_len` cells of the mask's bounding box, filled where it holds a person pixel: 1 x 1
    makes a rectangle. No iterations leave the mask as it was measured, without blocks too.
    """

    iterations: int = 3
    k: int = 7
    w_len: int = 1
    h_len: int = 1

    def __post_init__(self) -> None:
        least = {"iterations": 0, "k": 1, "w_len": 1, "h_len": 1}
        problems = [
            f"--{name} {getattr(self, name)}: give {bound} or more"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def __call__(self, mask: "Mask") -> "Mask":
        """Grow a (T, H, W) mask."""
        import numpy as np

        from wan_accel.data.masks import block_augment, dilate

        if self.iterations == 0:
            return mask
        grown = dilate(mask, kernel_pixels=self.k, iterations=self.iterations)
        return np.stack([block_augment(frame, num_columns=self.w_len, num_rows=self.h_len) for frame in grown])


WAN_GROWTH = MaskGrowth()
