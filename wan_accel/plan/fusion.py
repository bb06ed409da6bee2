"""Compiled blocks without a GPU: the compiler's own graphs and its choice of what to keep, run operator by operator.

What inductor fuses is not allocated: of a graph only the operands and results of kernels that it does not write itself
(matrix products, attention, collectives) and what leaves the graph are. `TrackMemory` is told so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from wan_accel.plan.memory import TrackMemory

# Operators of aten with kernels of their own, beside attention's.
_KERNELS = frozenset(["mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_mm"])
_VIEWS = frozenset(["_unsafe_view", "reshape"])


def tracing_backend(memory: TrackMemory) -> Callable[..., Any]:
    """A dynamo backend: inductor's decompositions and partitioner, whose graphs run as described above."""
    from torch._inductor.decomposition import select_decomp_table

    run = partial(_executable, memory)
    return aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=run,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table,
        keep_inference_input_mutations=True,
    )


def _executable(memory: TrackMemory, graph: fx.GraphModule, inputs: Any) -> Callable[[list[Any]], Any]:
    allocated = allocated_nodes(graph.graph)

    def run(args: list[Any]) -> Any:
        taken = list(args)
        args.clear()  # boxed: what the graph has read last is freed at once
        return _Run(graph, memory, allocated).run(*taken)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Run(fx.Interpreter):
    """One run of a graph; its values go with it."""

    def __init__(self, graph: fx.GraphModule, memory: TrackMemory, allocated: set[fx.Node]) -> None:
        super().__init__(graph)
        self._memory = memory
        self._allocated = allocated

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n in self._allocated:
            return super().run_node(n)
        with self._memory.hidden():
            return super().run_node(n)


def allocated_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose result is a tensor in memory: made or read by a kernel of its own, or an output; through views."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _is_kernel(node) or any(
            user.op == "output" or _is_kernel(user) or (_is_view(user) and user in found) for user in node.users
        ):
            found.add(node)
    return found


def _is_kernel(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    namespace, name = node.target._schema.name.split("::")
    return namespace not in ("aten", "prims") or name in _KERNELS or name.startswith("_scaled_dot_product")


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.is_view or node.target._schema.name.split("::")[1] in _VIEWS
    return getattr(node.target, "__name__", "") == "getitem"
