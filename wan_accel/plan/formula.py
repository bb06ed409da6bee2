"""Bytes a rank by formula, for every engine: what stays through a run, what is gathered, the peak of a step. Pure.

Elements of rank 0, which holds the largest shards. What a step adds (`StepMemory`) comes from a trace or a measurement.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from wan_accel.optimizers import state_bytes, step_bytes
from wan_accel.parallel.names import is_zero
from wan_accel.plan.layout import Layout
from wan_accel.plan.weights import Unit, Weight, total

FP32, BF16 = 4, 2
EmaPlace = Literal["accelerator", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How weights are trained: the optimizer (`training.optim`), the moving average, the experts in memory."""

    optim: str
    ema: EmaPlace | None = None
    num_experts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Bytes a rank that stay through a run (gradients: through the end of a step). `host`: in host memory."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int = 0
    host: int = 0

    @property
    def without_gradients(self) -> int:
        return self.parameters + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return self.without_gradients + self.gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes a rank that forward and backward add: kept by a layer, kept around the layers, and worked with at the peak.

    The last are what the peak adds to everything that is kept at the end of the forward pass.
    """

    layer: float
    around: float
    working: float

    def kept(self, num_layers: int) -> float:
        return num_layers * self.layer + self.around


def fixed_bytes(units: Sequence[Unit], layout: Layout, how: Trained) -> Fixed:
    """What stays in memory: each engine's own copies."""
    weights = [weight for unit in units for weight in unit.weights]
    if is_zero(layout.engine):
        one = _zero_fixed(weights, layout, how)
    else:
        one = _plain_fixed(weights, layout, how)
    n = how.num_experts
    return Fixed(
        parameters=n * one.parameters, gradients=n * one.gradients, optimizer=n * one.optimizer, ema=n * one.ema,
        host=n * one.host,
    )  # fmt: skip


def _plain_fixed(weights: Sequence[Weight], layout: Layout, how: Trained) -> Fixed:
    """FSDP2, DDP and one process: parameters as the recipe stores them, gradients of the same dtype.

    With FSDP2's offloading all of it lies in host memory, the moving average too, wherever it was asked for.
    """
    shards = layout.num_shards
    trained = [weight for weight in weights if weight.is_trained]
    ema = FP32 * sum(weight.shard(shards) for weight in trained) if how.ema else 0
    fixed = Fixed(
        parameters=sum(weight.itemsize * weight.shard(shards) for weight in weights),
        gradients=sum(weight.itemsize * weight.shard(shards) for weight in trained),
        optimizer=sum(state_bytes(how.optim, _shard_shape(weight, shards)) for weight in trained),
        ema=ema if how.ema == "accelerator" else 0,
        host=ema if how.ema == "cpu" else 0,
    )
    if layout.offload == "none":
        return fixed
    return Fixed(parameters=0, gradients=0, optimizer=0, host=fixed.total + fixed.host)


def optimizer_bytes(units: Iterable[Unit], layout: Layout, how: Trained) -> int:
    """Optimizer state of a rank of FSDP2, DDP or one process, wherever it lies; of one expert."""
    weights = [weight for unit in units for weight in unit.trained()]
    return sum(state_bytes(how.optim, _shard_shape(weight, layout.num_shards)) for weight in weights)


def _shard_shape(weight: Weight, shards: int) -> tuple[int, ...]:
    return (-(-weight.shape[0] // shards), *weight.shape[1:]) if weight.shape else ()


def _zero_fixed(weights: Sequence[Weight], layout: Layout, how: Trained) -> Fixed:
    """ZeRO (deepspeed 0.19): parameters and gradients in the compute dtype, fp32 masters beside them.

    ZeRO-3 cuts a flattened parameter into equal parts, and takes fp32 parameters for their own masters. ZeRO-2 cuts
    all that are trained, one after the other, and has whole parameters.
    """
    itemsize, is_whole = BF16 if layout.is_mixed else FP32, layout.engine == "zero2"
    trained = _zero_part([weight for weight in weights if weight.is_trained], layout)
    parameters = sum(
        (itemsize if layout.is_mixed else weight.itemsize)
        * (weight.numel if is_whole else -(-weight.numel // layout.num_shards))
        for weight in weights
    )
    masters = FP32 * trained if layout.is_mixed or is_whole else 0
    optimizer = masters + state_bytes(how.optim, (trained,))
    gradients, ema = itemsize * trained, FP32 * trained if how.ema else 0
    host = ema if how.ema == "cpu" else 0
    if layout.offload != "none":
        host += optimizer + gradients + FP32 * trained  # and the fp32 gradients that the host's optimizer reads
        host += itemsize * trained if is_whole else 0  # stepped weights on their way up
        optimizer = gradients = 0
    if layout.offload == "parameters":
        host += parameters
        parameters = 0
    return Fixed(
        parameters=parameters, gradients=gradients, optimizer=optimizer, host=host,
        ema=ema if how.ema == "accelerator" else 0,
    )  # fmt: skip


def _zero_part(weights: Sequence[Weight], layout: Layout) -> int:
    """Elements of a rank's part."""
    if layout.engine == "zero2":
        return -(-total(weights) // layout.num_shards)
    return sum(-(-weight.numel // layout.num_shards) for weight in weights)


def gathered_bytes(units: Sequence[Unit], layout: Layout) -> int:
    """Buffers of an engine's collectives at the peak of a step."""
    if layout.is_sharded:
        return _fsdp_buffers(units, layout)
    if layout.engine == "zero3":
        return _zero_buffers(units, layout)
    if layout.engine == "zero2":
        return _zero2_buffers(units, layout)
    if layout.engine == "ddp":  # its buckets are copies of the gradients
        return sum(weight.itemsize * weight.numel for unit in units for weight in unit.trained())
    return 0


def _fsdp_buffers(units: Sequence[Unit], layout: Layout) -> int:
    """While a block is differentiated: its parameters and the root's, the next block's on their way, and the gradients
    of the one before in fp32 until they are reduced. Without resharding every parameter is gathered from forward on.
    """
    blocks = [unit for unit in units if not unit.is_root]
    largest = max((gathered_size(unit, layout) for unit in blocks), default=0)
    reduced = max((reduced_size(unit, layout) for unit in blocks), default=0)
    if not layout.reshard_after_forward:
        return sum(gathered_size(unit, layout) for unit in units) + reduced
    root = sum(gathered_size(unit, layout) for unit in units if unit.is_root)
    return root + 2 * largest + reduced + 2 * _largest_copy(blocks, layout)


def _largest_copy(blocks: Sequence[Unit], layout: Layout) -> int:
    """With offloading a rank's part of a block comes up as it is stored, before it is gathered."""
    if layout.offload == "none":
        return 0
    shards = layout.num_shards
    return max((sum(weight.itemsize * weight.shard(shards) for weight in unit.weights) for unit in blocks), default=0)


def gathered_size(unit: Unit, layout: Layout) -> int:
    """Bytes of an all-gather's output: every shard as large as the first."""
    return sum(
        (BF16 if layout.is_mixed else weight.itemsize) * layout.num_shards * weight.shard(layout.num_shards)
        for weight in unit.weights
    )


def reduced_size(unit: Unit, layout: Layout) -> int:
    """Bytes of a reduce-scatter's input: trained parameters, in fp32 where precision is mixed."""
    return sum(
        (FP32 if layout.is_mixed else weight.itemsize) * layout.num_shards * weight.shard(layout.num_shards)
        for weight in unit.trained()
    )


def _zero_buffers(units: Sequence[Unit], layout: Layout) -> int:
    """ZeRO-3's live and prefetched parameters, and the bucket that gradients are reduced in, which is always there."""
    itemsize, zero = BF16 if layout.is_mixed else FP32, layout.zero
    elements = total(weight for unit in units for weight in unit.weights)
    live = min(elements, zero.stage3_max_live_parameters + zero.stage3_prefetch_bucket_size)
    return itemsize * (live + zero.reduce_bucket_size)


def _zero2_buffers(units: Sequence[Unit], layout: Layout) -> int:
    """The bucket that ZeRO-2 collects gradients in during a backward pass, and a copy of it that is reduced."""
    itemsize, bucket = BF16 if layout.is_mixed else FP32, layout.zero.reduce_bucket_size
    return itemsize * (bucket + min(bucket, total((weight for unit in units for weight in unit.weights), trained=True)))


def optimizer_step_bytes(units: Sequence[Unit], layout: Layout, how: Trained) -> int:
    """What an optimizer's step needs beside what is fixed, when activations are gone."""
    if layout.engine == "zero2" and layout.offload == "none":
        part = _zero_part([weight for unit in units for weight in unit.trained()], layout)
        if not layout.is_mixed:  # gradients are copied into one tensor
            return FP32 * part + step_bytes(how.optim, part)
        # Copied in bf16, that copy in fp32; both of bf16 are gone when the optimizer steps.
        return max((BF16 + FP32) * part, (FP32 - BF16) * part + step_bytes(how.optim, part))
    trained = sum(weight.shard(layout.num_shards) for unit in units for weight in unit.trained())
    if layout.engine == "zero3" and layout.offload == "none" and layout.is_mixed:
        trained = min(trained, layout.zero.sub_group_size)
        return FP32 * trained + step_bytes(how.optim, trained)  # bf16 gradients become fp32, a sub-group at a time
    return 0 if layout.offload != "none" else step_bytes(how.optim, trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Bytes of a rank at the moment when they are most. encoders: of conditions that are encoded on the fly."""

    moment: str
    parameters: float
    gradients: float
    optimizer: float
    ema: float = 0
    encoders: float = 0
    buffers: float = 0
    activations: float = 0
    temporaries: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("parameters", "gradients", "optimizer", "ema", "encoders", "buffers", "activations", "temporaries")


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a run's steps are like.

    num_layers: transformer blocks. accumulates: an optimizer step has several micro-batches (or experts), so that
    gradients are there from the start. encoders: bytes of their weights. encoding: what they work with at their peak.
    """

    num_layers: int
    accumulates: bool = False
    encoders: int = 0
    encoding: int = 0


def peak_of(units: Sequence[Unit], layout: Layout, how: Trained, step: StepMemory, load: Load) -> Peak:
    """The most that a rank holds at once.

    Activations are freed as gradients come, so it is at the first layer of the backward pass, at its last, in the
    optimizer's step, or while videos are encoded.

    Args:
        units: of one expert.
        layout: the layout.
        how: what is trained and how.
        step: what forward and backward add.
        load: what steps are like.
    """
    fixed, buffers = fixed_bytes(units, layout, how), gathered_bytes(units, layout)
    has_gradients = load.accumulates or layout.engine == "zero3"  # ZeRO-3 has its buffer of them always
    at_first = fixed.gradients if has_gradients else 0
    # ZeRO-2 adds a micro-step's gradients to those before when it has them all.
    at_last = fixed.gradients * (2 if layout.engine == "zero2" and load.accumulates else 1)

    def moment(name: str, gradients: float, buffers: float, activations: float, temporaries: float) -> Peak:
        return Peak(
            moment=name, parameters=fixed.parameters, gradients=gradients, optimizer=fixed.optimizer, ema=fixed.ema,
            encoders=load.encoders, buffers=buffers, activations=activations, temporaries=temporaries,
        )  # fmt: skip

    moments = (
        moment("backward, first layer", at_first, buffers, step.kept(load.num_layers), step.working),
        moment("backward, last layer", at_last, buffers, step.kept(1), step.working),
        moment("optimizer step", fixed.gradients, 0, 0, optimizer_step_bytes(units, layout, how)),
        moment("encoding videos", at_first, 0, 0, load.encoding),
    )
    return max(moments, key=lambda one: one.total)
