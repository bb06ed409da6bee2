"""What the equivalence table is over: every engine, Ulysses degree, variant and method, and what of it does not fit."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

from wan_accel.models.recompute import Policy

MAX_RANKS = 4
ENGINES = ("ddp", "fsdp2", "hsdp", "zero3")  # of tests/ranks.py
DEGREES = (1, 2, 4)
VARIANTS = ("t2v-1.3b", "ti2v-5b", "animate-14b")
METHODS = ("full", "lora")
CASES = tuple(product(VARIANTS, METHODS))

# All that is left out of the product, and why: the error that says so to a user.
LEFT_OUT = {("hsdp", 4): "parallel.ulysses=4 does not divide the 2 ranks of a shard group"}
# Recomputation differs from layout to layout, as no result depends on it.
_POLICIES: dict[tuple[str, int], Policy] = {
    ("fsdp2", 2): "full", ("ddp", 4): "full", ("zero3", 1): "full",
    ("fsdp2", 4): "attention", ("hsdp", 2): "attention", ("zero3", 2): "attention",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Ranks and how they work together: as few as an engine and a Ulysses degree need beside each other."""

    engine: str
    ulysses: int

    @property
    def name(self) -> str:
        """As in ddp-2, hsdp-2x2-ulysses-2."""
        ranks = f"{self.replicas}x{self.num_shards}" if self.engine == "hsdp" else f"{self.num_ranks}"
        return f"{self.engine}-{ranks}" + (f"-ulysses-{self.ulysses}" if self.ulysses > 1 else "")

    @property
    def num_ranks(self) -> int:
        return 2 if self.ulysses == 1 and self.engine != "hsdp" else MAX_RANKS

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.num_ranks if self.engine == "ddp" else 2 if self.engine == "hsdp" else 1

    @property
    def num_shards(self) -> int:
        """Ranks that share a copy."""
        return self.num_ranks // self.replicas

    @property
    def policy(self) -> Policy:
        return _POLICIES.get((self.engine, self.ulysses), "none")

    @property
    def options(self) -> dict[str, Any]:
        """Of `test_equivalence.train`. Four ranks run two samples at once where they have them, two ranks one."""
        micro_batch = 2 if self.num_ranks == MAX_RANKS else 1
        return {
            "world_size": self.num_ranks, "engine": self.engine, "policy": self.policy, "micro_batch": micro_batch,
        }  # fmt: skip

    def elements(self, shapes: list[tuple[int, ...]], rank: int) -> int:
        """Parameter elements that `rank` holds.

        `fully_shard` cuts dim 0 as `torch.chunk` does; DeepSpeed cuts the flat parameter, padded to equal parts.
        """
        return sum(self._share(shape, rank % self.num_shards) for shape in shapes)

    def _share(self, shape: tuple[int, ...], place: int) -> int:
        if self.engine == "zero3":
            return -(-math.prod(shape) // self.num_shards)
        rows = -(-shape[0] // self.num_shards)
        return max(0, min(rows, shape[0] - place * rows)) * math.prod(shape[1:])


LAYOUTS = tuple(
    Layout(engine=engine, ulysses=ulysses)
    for engine, ulysses in product(ENGINES, DEGREES)
    if (engine, ulysses) not in LEFT_OUT
)
