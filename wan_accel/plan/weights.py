"""The parameters of the model that a recipe trains: from the shapes of its checkpoint, or as released."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import FACE_BLOCK_EVERY, AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.hub import is_hub_id, resolve_checkpoint
from wan_accel.models.loading import dit_folder
from wan_accel.models.reader import CheckpointReader, TensorShapes
from wan_accel.models.variants import DitSize, Variant
from wan_accel.parallel.fsdp import shard_units
from wan_accel.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShapes:
    """The tensors of a model, for where no checkpoint is at hand."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    num_heads: int


def open_shapes(recipe: Recipe, variant: Variant) -> TensorShapes:
    """Shapes of `model.checkpoint` where it is there, headers only; otherwise the released ones.

    The experts of a pair have the same.

    Raises:
        CheckpointError: the checkpoint is there, and damaged or another variant's.
    """
    checkpoint = recipe.model.checkpoint
    if is_hub_id(checkpoint):
        try:
            checkpoint = str(resolve_checkpoint(checkpoint, recipe.model.revision))
        except ValueError:  # not fetched yet
            return released_shapes(variant)
    if not Path(checkpoint).exists():
        return released_shapes(variant)
    return CheckpointReader(dit_folder(Path(checkpoint), variant, variant.experts[0].name))


def released_shapes(variant: Variant) -> ModelShapes:
    """Shapes of the released model, from the variants table."""
    size, animate = variant.dit, None
    if variant.has_animate_adapter:
        num_face_blocks = -(-size.num_layers // FACE_BLOCK_EVERY)
        animate = AnimateSize(dim=size.dim, num_heads=size.num_heads, num_face_blocks=num_face_blocks)
    return shapes_of(size, animate, folder=Path(variant.hub_id))


def shapes_of(size: DitSize, animate: AnimateSize | None, *, folder: Path) -> ModelShapes:
    """Shapes of a model of any size, under the name of `folder`."""
    with torch.device("meta"):
        adapter = None if animate is None else build_animate_adapter(animate)
        model = WanDenoiser(build_dit(size), adapter, with_motion_encoder=animate is not None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return ModelShapes(folder=folder, shapes=shapes, num_heads=size.num_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter: its shape, bytes an element where it is stored, and whether it is trained."""

    shape: tuple[int, ...]
    itemsize: int
    is_trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, num_shards: int) -> int:
        """Elements of the largest shard: `fully_shard` cuts dim 0 into ceil-sized chunks, the first rank has one."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // num_shards) * math.prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Parameters that FSDP2 gathers together. `is_root`: those outside of every block."""

    weights: tuple[Weight, ...]
    is_root: bool = False

    def trained(self) -> tuple[Weight, ...]:
        return tuple(weight for weight in self.weights if weight.is_trained)


def units_of(model: WanDenoiser) -> tuple[Unit, ...]:
    """The units of a denoiser (on meta is enough), in the order in which they are sharded; the root is last."""
    modules = shard_units(model)
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    units = [Unit(weights=_weights(module.parameters())) for module in modules]
    return (*units, Unit(weights=_weights(rest), is_root=True))


def _weights(parameters: Iterable[nn.Parameter]) -> tuple[Weight, ...]:
    return tuple(
        Weight(shape=tuple(one.shape), itemsize=one.element_size(), is_trained=one.requires_grad) for one in parameters
    )


def total(weights: Iterable[Weight], *, trained: bool = False) -> int:
    """Elements of some weights, or of the trained ones among them."""
    return sum(weight.numel for weight in weights if weight.is_trained or not trained)
