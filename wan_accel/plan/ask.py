"""What is asked of a plan: a recipe on a layout, with its model and its batches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from wan_accel.assemble import Techniques, build_skeleton, techniques_of
from wan_accel.draws import Bucket
from wan_accel.flops import StepFlops, Work, recomputed_flops, split_step_flops
from wan_accel.models.dit import dit_size_from_shapes
from wan_accel.models.hub import is_hub_id
from wan_accel.models.reader import TensorShapes
from wan_accel.models.variants import DitSize, Variant, get_variant
from wan_accel.objective import Weighting
from wan_accel.optimizers import DEFAULT_OPTIM
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.plan.buckets import Batches, largest_batches
from wan_accel.plan.formula import Trained
from wan_accel.plan.layout import Layout
from wan_accel.plan.simulate import CPU, MakeOptimizer, as_traced
from wan_accel.plan.weights import Unit, units_of
from wan_accel.recipe.arguments import DEFAULTS
from wan_accel.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A recipe on a layout.

    shapes: of the model's tensors. clips: of each bucket.
    """

    recipe: Recipe
    layout: Layout
    shapes: TensorShapes
    clips: Mapping[Bucket, int]

    @property
    def variant(self) -> Variant:
        return get_variant(self.recipe.variant)

    @cached_property
    def techniques(self) -> Techniques:
        return techniques_of(self.recipe, seed=0)

    @cached_property
    def size(self) -> DitSize:
        return dit_size_from_shapes(self.shapes.shapes, num_heads=self.shapes.num_heads)

    @cached_property
    def batches(self) -> Batches:
        return largest_batches(self.recipe.data, self.variant, self.clips, self.layout.num_data_ranks)

    @property
    def num_tokens(self) -> int:
        """Of a sample of the largest micro-batch."""
        return self.variant.num_tokens(*self.batches.bucket)

    @property
    def accumulates(self) -> bool:
        """Gradients of a step's earlier micro-batches are there while a later one runs."""
        return self.batches.num_micro_steps > 1 or self.batches.has_mixed_steps or self.how.num_experts > 1

    @property
    def how(self) -> Trained:
        ema = self.recipe.method.ema
        return Trained(
            optim=self.recipe.training.get("optim", DEFAULT_OPTIM),
            ema=None if ema is None else ema.device,
            num_experts=len(self.variant.trained_experts(self.recipe.model.expert)),
        )

    @property
    def weighting(self) -> Weighting:
        return "bell" if self.recipe.objective.preset == "diffsynth" else self.recipe.objective.weighting

    @property
    def checkpoints_kept(self) -> int | None:
        return self.recipe.training.get("save_total_limit", DEFAULTS["save_total_limit"])

    @property
    def is_async_save(self) -> bool:
        return bool(self.recipe.training.get("async_save", True))

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, which need not exist."""
        name = self.recipe.model.checkpoint
        return Path(self.shapes.folder) if is_hub_id(name) else Path(name)

    @property
    def work(self) -> Work:
        lora = self.techniques.lora
        return Work(lora_rank=None if lora is None else lora.r, has_face_blocks=self.variant.has_animate_adapter)

    def flops(self) -> tuple[StepFlops, StepFlops]:
        """A rank's in an optimizer step, the model's and what is computed again."""
        samples = self.batches.num_samples * self.batches.num_micro_steps / self.layout.ulysses
        found = split_step_flops(self.size, self.num_tokens, self.work)
        again = recomputed_flops(self.size, self.num_tokens, self.work, self.techniques.activation_checkpointing)
        return _times(found, samples), _times(again, samples)

    def on(self, layout: Layout, recipe: Recipe) -> "Ask":
        """The same with another layout and recipe."""
        return replace(self, layout=layout, recipe=recipe)


def _times(flops: StepFlops, factor: float) -> StepFlops:
    return StepFlops(products=factor * flops.products, attention=factor * flops.attention)


def planned_units(ask: Ask) -> tuple[Unit, ...]:
    """The parameters of one expert, with the recipe's adapters."""
    return units_of_skeleton(ask.variant, ask.shapes, ask.techniques)


def units_of_skeleton(variant: Variant, shapes: TensorShapes, techniques: Techniques) -> tuple[Unit, ...]:
    """The parameters of a model of these shapes, adapted."""
    alone = ParallelDims(world_size=1)
    return units_of(build_skeleton(variant, shapes, as_traced(techniques), alone, CPU))


def optimizer_of(recipe: Recipe) -> MakeOptimizer | None:
    """Makes the optimizer that Trainer would make, with the kernels that it would have on a GPU.

    None for those of other packages: torchao compiles its step, and asks tensors for their values.
    """
    from transformers import Trainer

    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.recipe.arguments import training_arguments

    arguments = WanTrainingArguments(**{**training_arguments(recipe), "use_cpu": True})
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if not kind.__module__.startswith("torch.optim"):
        return None
    if not options.get("fused"):
        options = {**options, "foreach": True}
    return lambda parameters: kind(list(parameters), **options)
