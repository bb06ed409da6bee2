"""Compile a denoiser's blocks one by one: all blocks of a kind share a graph, one for each shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from wan_accel.models.blocks import CheckpointedModule

# Graphs beyond the planned shapes: a global state that changes once, such as autocast or deterministic algorithms.
SPARE_GRAPHS = 2
Backend = str | Callable[..., Any]


def compile_blocks(model: nn.Module, *, num_shapes: int, budget: float = 1.0, backend: Backend = "inductor") -> None:
    """Let every block of a model run compiled where it is differentiated. Names in the state dict stay.

    Graphs have static shapes and no breaks. Only passes with gradients are compiled: validation and sampling would
    add a graph for every shape of theirs. Dynamo counts graphs a function, and all blocks run the same one: a shape
    has a graph for each kind of block (transformer, face), and one for a first block whose input needs no gradient.

    Args:
        num_shapes: different shapes of a micro-batch in the run; a graph beyond them is an error when it is asked for.
        budget: share of activations that the partitioner may keep, 1 for what is fastest. It holds for the process.
        backend: dynamo's, by name or itself; others than inductor are for tests and for planning.
    """
    blocks = [module for module in model.modules() if isinstance(module, CheckpointedModule)]
    limit = num_shapes * (len({type(block) for block in blocks}) + 1) + SPARE_GRAPHS
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = limit
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    # DDP's own splitting cannot handle checkpointing inside a graph, and blocks are small enough graphs already.
    dynamo.optimize_ddp = False
    torch._functorch.config.activation_memory_budget = budget
    for block in blocks:
        block.compiled = _compiled(block.run, num_shapes, backend)


def _compiled(run: Callable[..., Tensor], num_shapes: int, backend: Backend) -> Callable[..., Tensor]:
    fast = torch.compile(run, dynamic=False, fullgraph=True, backend=backend)

    def call(*args: object) -> Tensor:
        try:
            return fast(*args)
        except FailOnRecompileLimitHit as error:
            shapes = ", ".join(str(tuple(arg.shape)) for arg in args if isinstance(arg, Tensor))
            raise RuntimeError(
                f"memory.compile: a block has been given inputs of more kinds than the {num_shapes} shapes of the step "
                f"plan (now {shapes}), and each would be compiled anew: bring clips to fewer sizes and lengths, or set "
                "memory.compile: false. TORCH_LOGS=recompiles shows what differs"
            ) from error

    return call
