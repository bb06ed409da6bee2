"""Whether a peak fits a GPU. Pure."""

import re
from dataclasses import dataclass

GIB = 2**30
# Of a GPU's memory: CUDA's context, NCCL's buffers, and what the allocator cannot use.
RESERVE = 0.06
_UNITS = {"GiB": GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A GPU's memory in bytes, and the share of it that no plan may use."""

    memory: float
    reserve: float = RESERVE

    def holds(self, peak: float) -> bool:
        return peak <= (1 - self.reserve) * self.memory

    def verdict(self, peak: float) -> str:
        word = "fits" if self.holds(peak) else "does not fit"
        return f"{word}: peak {peak / GIB:.1f} of {self.memory / GIB:.1f} GiB (reserve {self.reserve:.0%})"


def parse_memory(text: str) -> float:
    """`80GiB` to bytes.

    Raises:
        ValueError: no number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)", text)
    if match is None or not float(match[1]):
        raise ValueError(f"--gpu_memory {text}: give a number and a unit, for instance 80GiB (or GB, MiB, MB)")
    return float(match[1]) * _UNITS[match[2]]
