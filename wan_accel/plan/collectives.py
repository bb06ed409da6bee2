"""Collectives of a step, counted where they are called: of a simulation and of a real run alike."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from wan_accel.parallel.ulysses import exchange_chunks

c10d = torch.ops.c10d
# Operator -> its name here, and which argument is the whole tensor (of an all-gather the output).
_COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::alltoall_base_": ("all-to-all", 0),
    "wan_accel::exchange_chunks": ("all-to-all", 0),
}
assert exchange_chunks  # registers the last one


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of one kind over the groups of one axis. calls: None where an engine's own batching decides.

    bytes: of the whole tensor (an all-gather's output, a reduce-scatter's input), over all calls.
    """

    kind: str
    axis: str
    num_ranks: int
    calls: int | None
    bytes: int


class CountCollectives(TorchDispatchMode):
    """Counts collectives that are called inside of it, fake or real.

    Args:
        axes: name of a process group -> the axis that it is of; others are listed under their own name.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self._axes = axes
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, int]] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # lets dynamo compile under it: it only looks on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _COLLECTIVES:
            kind, position = _COLLECTIVES[name]
            group = _group_of(args)
            key = (kind, self._axes.get(group.group_name, group.group_name), group.size())
            self._calls[key] += 1
            self._bytes[key] += _nbytes(args[position])
        return func(*args, **(kwargs or {}))

    @property
    def traffic(self) -> list[Traffic]:
        """What was counted, by axis and kind."""
        return [
            Traffic(kind=kind, axis=axis, num_ranks=size, calls=self._calls[key], bytes=self._bytes[key])
            for key in sorted(self._calls, key=lambda key: (key[1], key[0]))
            for kind, axis, size in [key]
        ]


def _group_of(args: Any) -> dist.ProcessGroup:
    """The process group among an operator's arguments, as an object of torch's script or by name."""
    for arg in args:
        if isinstance(arg, str):
            return _resolve_process_group(arg)  # type: ignore[arg-type]
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise AssertionError(f"no process group among {args}")


def _nbytes(value: Any) -> int:
    tensors = [value] if isinstance(value, Tensor) else value
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
