"""One rank of FSDP2 or HSDP without the others, GPUs or weights: the real model and step on fake tensors.

A fake process group answers every collective at once; fake tensors have shapes and storages, and no content.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from wan_accel.assemble import Techniques, build_skeleton
from wan_accel.draws import Bucket
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.reader import TensorShapes
from wan_accel.models.recompute import recompute_of
from wan_accel.models.variants import TEXT_LENGTH, Variant
from wan_accel.objective import Weighting
from wan_accel.optimizers import state_bytes
from wan_accel.parallel.fsdp import fully_shard_denoiser
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.plan.batch import micro_batch
from wan_accel.plan.collectives import CountCollectives, Traffic
from wan_accel.plan.fusion import tracing_backend
from wan_accel.plan.layout import Layout
from wan_accel.plan.memory import Purpose, TrackMemory
from wan_accel.plan.shaped import gpu_operators
from wan_accel.plan.step import run_micro_step

CPU = torch.device("cpu")
FIXED: tuple[Purpose, ...] = ("parameters", "gradients", "optimizer", "ema")
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A micro step to simulate.

    bucket, num_samples: of the micro-batch. optim: `training.optim`. optimizer: makes that over some parameters, None
    where it cannot step on fake tensors; its state is then counted by formula.
    accumulates: an optimizer step has several micro-batches, so gradients are there from the start. has_ema: an average
    of the trained weights lies on the GPU.
    """

    variant: Variant
    shapes: TensorShapes
    techniques: Techniques
    layout: Layout
    bucket: Bucket
    num_samples: int
    optim: str
    optimizer: MakeOptimizer | None
    accumulates: bool = False
    has_ema: bool = False
    weighting: Weighting = "none"
    text_length: int = TEXT_LENGTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Bytes of rank 0.

    fixed: parameters, gradients, optimizer and average as they are after a step. kept: activations between forward and
    backward. peak: by purpose, when they were most. optimizer_temporaries: what an optimizer's step has beside what is
    fixed.
    """

    fixed: Mapping[Purpose, int]
    kept: int
    peak: Mapping[Purpose, int]
    optimizer_temporaries: int
    collectives: tuple[Traffic, ...]


def simulate(task: Task) -> Simulated:
    """Run a micro step of rank 0, and the optimizer's step behind it.

    Raises:
        ValueError: the degrees do not fit.
    """
    with fake_ranks(task.layout.world_size):
        return _simulate(task)


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks, of which only this one, rank 0, exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _simulate(task: Task) -> Simulated:
    layout, memory = task.layout, TrackMemory()
    dims = ParallelDims(world_size=layout.world_size, ulysses=layout.ulysses, dp_replicate=layout.dp_replicate)
    model = build_skeleton(task.variant, task.shapes, as_traced(task.techniques), dims, CPU)
    model.text_length = task.text_length
    if task.techniques.compile:
        BlockTracer(task.techniques, memory).compile(model)
    mesh = dims.shard_mesh("cpu")
    fully_shard_denoiser(model, _plugin(layout), mesh)
    counter = CountCollectives(axes_of(model, mesh))
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_operators(), memory:
        with memory.counted_as("parameters"):
            model.to_empty(device=CPU)
        averages = _averages(model, memory) if task.has_ema else []
        optimizer, temporaries = _optimizer_state(model, task, memory)
        if task.accumulates:
            _add_gradients(model, memory)
        batch = micro_batch(
            task.variant, task.shapes, task.bucket, task.num_samples, text_length=task.text_length
        )  # fmt: skip
        memory.restart_peak()
        with counter:
            kept = run_micro_step(
                model, task.variant, batch, lambda: memory.live["other"], weighting=task.weighting
            )
        fixed = {purpose: memory.live[purpose] for purpose in FIXED}
        del optimizer, averages  # were held in memory until here
    return Simulated(
        fixed=fixed, kept=kept, peak=dict(memory.peak), optimizer_temporaries=temporaries,
        collectives=tuple(counter.traffic),
    )  # fmt: skip


def as_traced(techniques: Techniques) -> Techniques:
    """Techniques on fake tensors: every attention kernel keeps what torch's does, and blocks are traced apart."""
    return replace(techniques, attention="sdpa", compile=False)


class BlockTracer:
    """Lets blocks run as the compiler would have them; models share their graphs.

    Args:
        techniques: those of the models.
        memory: what is told of tensors that are fused away.
    """

    def __init__(self, techniques: Techniques, memory: TrackMemory) -> None:
        torch._dynamo.reset()  # what was traced before is of other fake tensors
        self._budget = recompute_of(techniques.activation_checkpointing).budget
        self._backend = tracing_backend(memory)

    def compile(self, model: WanDenoiser) -> None:
        compile_blocks(model, num_shapes=1, budget=self._budget, backend=self._backend)


def _plugin(layout: Layout) -> FullyShardedDataParallelPlugin:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=layout.reshard_after_forward)
    if layout.is_mixed:
        plugin.set_mixed_precision("bf16")
    return plugin


def axes_of(model: WanDenoiser, mesh: DeviceMesh) -> dict[str, str]:
    """Names of process groups -> their axes. A group of all ranks may serve two: it is `dp_shard` then."""
    parallel = model.sequence_parallel
    axes = {} if parallel is None else {parallel.group_name: "ulysses"}
    assert mesh.mesh_dim_names is not None
    return axes | {mesh.get_group(name).group_name: name for name in mesh.mesh_dim_names}


def _trained(model: WanDenoiser) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _averages(model: WanDenoiser, memory: TrackMemory) -> list[Tensor]:
    with memory.counted_as("ema"):
        return [torch.empty_like(_local(parameter.detach())) for parameter in _trained(model)]


def _optimizer_state(model: WanDenoiser, task: Task, memory: TrackMemory) -> tuple[object, int]:
    """What holds the optimizer's state for this rank's shards, and what a step adds to it."""
    # On local tensors: what DTensors propagate on fake ones is as large as the whole model.
    shards = [nn.Parameter(_local(parameter.detach())) for parameter in _trained(model)]
    with memory.counted_as("optimizer"):
        if task.optimizer is None:
            return [torch.empty(state_bytes(task.optim, shard.shape), dtype=torch.uint8) for shard in shards], 0
        return _step(task.optimizer(shards), shards, memory)


def _step(
    optimizer: torch.optim.Optimizer, shards: Sequence[nn.Parameter], memory: TrackMemory
) -> tuple[torch.optim.Optimizer, int]:
    """An optimizer after a step that makes its state, and what the next one adds."""
    with memory.counted_as("gradients"):
        for shard in shards:
            shard.grad = torch.empty_like(shard)
    optimizer.step()  # what this makes beside its state is the first step's alone
    memory.restart_peak()
    optimizer.step()
    temporaries = memory.peak.total() - memory.live.total()
    for shard in shards:
        shard.grad = None
    return optimizer, temporaries


def _add_gradients(model: WanDenoiser, memory: TrackMemory) -> None:
    with memory.counted_as("gradients"):
        for parameter in _trained(model):
            parameter.grad = torch.zeros_like(parameter)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
