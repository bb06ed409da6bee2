"""Memory that is allocated inside of a block of code, by what it is for, and its peak.

Storages are seen as they come and go, as `torch.cuda.max_memory_allocated` sees them, without what the allocator
rounds up or keeps for later.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# gathered: what an all-gather writes, and parameters made of it. reduced: what a reduce-scatter reads.
Purpose = Literal["parameters", "gradients", "optimizer", "ema", "gathered", "reduced", "other"]

# Arguments of a collective, by position, and what they turn out to be for.
_MOVED: dict[str, tuple[Purpose, ...]] = {
    "c10d::_allgather_base_": ("gathered",),
    "c10d::_reduce_scatter_base_": ("gradients", "reduced"),
}


class TrackMemory(TorchDispatchMode):
    """Follows the storages of all tensors that operators make inside of it.

    Attributes:
        live: bytes by purpose, now.
        peak: bytes by purpose when their sum was largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[Purpose] = Counter()
        self.peak: Counter[Purpose] = Counter()
        self._purpose: Purpose = "other"
        self._is_hidden = False
        self._known: dict[int, tuple[Purpose, int]] = {}
        self._original_resize = torch.UntypedStorage.resize_

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # lets dynamo compile under it: it only looks on

    def __enter__(self) -> "TrackMemory":
        original, tracker = self._original_resize, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            tracker._see(storage, "gathered", is_moved=True)  # FSDP2 frees and fills gathered parameters so
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @contextmanager
    def counted_as(self, purpose: Purpose) -> Iterator[None]:
        """What is made inside is for this."""
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """What is made inside exists in a fused kernel's registers only."""
        before, self._is_hidden = self._is_hidden, True
        try:
            yield
        finally:
            self._is_hidden = before

    def restart_peak(self) -> None:
        """Look for a new peak, from now on."""
        self.peak = self.live.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(_storage(value), self._purpose)
        if name in _MOVED:
            for position, purpose in enumerate(_MOVED[name]):
                self._see(_storage(args[position]), purpose, is_moved=True)
        return out

    def _see(self, storage: torch.UntypedStorage, purpose: Purpose, *, is_moved: bool = False) -> None:
        """Count a storage that is new or has another size; one that is known keeps its purpose unless it is moved."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            old, before = self._known[key]
            self.live[old] -= before
            purpose = purpose if is_moved else old
        elif self._is_hidden or is_moved:
            return
        else:
            weakref.finalize(storage, self._forget, key)
        self._known[key] = (purpose, size)
        self.live[purpose] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _forget(self, key: int) -> None:
        purpose, size = self._known.pop(key)
        self.live[purpose] -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Where a tensor's bytes are; a DTensor only says how large it is on all ranks together."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
