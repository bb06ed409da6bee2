"""What a micro step adds to a rank's memory, from two shallow models without sharding: quick, and for every engine.

Layers are alike, so what one more of them keeps is the difference of the two.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_accel.assemble import Techniques, build_skeleton
from wan_accel.draws import Bucket
from wan_accel.models.denoiser import WanDenoiser, split_tokens
from wan_accel.models.dit import FACE_BLOCK_EVERY, count_blocks
from wan_accel.models.reader import TensorShapes
from wan_accel.models.variants import TEXT_LENGTH, Variant
from wan_accel.objective import Weighting
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.ulysses import SequenceParallel
from wan_accel.plan.batch import micro_batch
from wan_accel.plan.formula import StepMemory
from wan_accel.plan.layout import Layout
from wan_accel.plan.memory import TrackMemory
from wan_accel.plan.shaped import gpu_operators
from wan_accel.plan.simulate import CPU, BlockTracer, as_traced
from wan_accel.plan.step import run_micro_step


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """A micro step to trace. `num_samples` of `bucket` on a rank at once."""

    variant: Variant
    shapes: TensorShapes
    techniques: Techniques
    bucket: Bucket
    num_samples: int
    weighting: Weighting = "none"
    text_length: int = TEXT_LENGTH


class OneOfGroup(SequenceParallel):
    """The first rank's share of a Ulysses group that does not exist; for fake tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.group_name = size, 0, "planned"

    def gather(self, x: Tensor, num_tokens: int) -> Tensor:
        """Takes the memory of an all-gather; backward likewise."""
        return torch.cat([x] * self.size, dim=1)[:, :num_tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstLayers:
    """The shapes of a checkpoint's first layers."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    num_heads: int | None


def first_layers(whole: TensorShapes, num_layers: int) -> FirstLayers:
    """Leave out the blocks from `num_layers` on, and the face blocks that follow them."""
    pattern = re.compile(r"(?:face_adapter\.fuser_(?=blocks))?blocks\.(\d+)\.")

    def is_kept(name: str) -> bool:
        match = pattern.match(name)
        if match is None:
            return True
        return int(match[1]) * (FACE_BLOCK_EVERY if name.startswith("face_adapter.") else 1) < num_layers

    shapes = {name: shape for name, shape in whole.shapes.items() if is_kept(name)}
    return FirstLayers(folder=whole.folder, shapes=shapes, num_heads=whole.num_heads)


def trace(step: MicroStep, layout: Layout) -> StepMemory:
    """Bytes a rank that a micro step adds, but for collectives' buffers and gradients."""
    few, more = (FACE_BLOCK_EVERY, 2 * FACE_BLOCK_EVERY) if step.variant.has_animate_adapter else (2, 3)
    num_layers = count_blocks(step.shapes.shapes, "blocks.")
    tracer = Tracer(step, layout)
    if num_layers <= more:  # a tiny model: all of it
        kept, working = tracer.run(num_layers)
        return StepMemory(layer=0, around=kept, working=working)
    kept_few, _ = tracer.run(few)
    kept_more, working = tracer.run(more)
    layer = (kept_more - kept_few) / (more - few)
    return StepMemory(layer=layer, around=kept_few - few * layer, working=working)


class Tracer:
    """Models of several depths under one compiler, which makes the graphs of their blocks once."""

    def __init__(self, step: MicroStep, layout: Layout) -> None:
        self._step = step
        self._layout = layout
        self._memory = TrackMemory()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._blocks = BlockTracer(step.techniques, self._memory) if step.techniques.compile else None

    def run(self, num_layers: int) -> tuple[int, int]:
        """Bytes that a model of some layers keeps between forward and backward, and the peak's beyond these."""
        step, memory = self._step, self._memory
        shapes = first_layers(step.shapes, num_layers)
        model = gathered_model(step, shapes, self._layout)
        if self._blocks is not None:
            self._blocks.compile(model)
        with self._fake, gpu_operators(), memory:
            before = memory.live["other"]
            with memory.counted_as("parameters"):
                model.to_empty(device=CPU)
            drop_gradients(model)
            batch = micro_batch(step.variant, shapes, step.bucket, step.num_samples, text_length=step.text_length)
            memory.restart_peak()
            kept = run_micro_step(
                model, step.variant, batch, lambda: memory.live["other"], weighting=step.weighting,
                autocast=is_autocast(self._layout),
            )  # fmt: skip
        return kept - before, memory.peak["other"] - kept


def is_autocast(layout: Layout) -> bool:
    """Whether bf16 comes from autocast, and not from the parameters that are gathered."""
    return layout.is_mixed and layout.engine in ("single", "ddp")


def gathered_model(step: MicroStep, shapes: TensorShapes, layout: Layout) -> WanDenoiser:
    """A model on the meta device in the dtype that it computes with, whole, not compiled yet."""
    alone = ParallelDims(world_size=1)
    model = build_skeleton(step.variant, shapes, as_traced(step.techniques), alone, CPU)
    model.text_length = step.text_length
    if layout.ulysses > 1:
        split_tokens(model, OneOfGroup(layout.ulysses))
    if layout.is_mixed and not is_autocast(layout):
        model.to(torch.bfloat16)
    return model


def drop_gradients(model: WanDenoiser) -> None:
    """Free a gradient where it would be reduced: its buffers are counted elsewhere."""

    def drop(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
