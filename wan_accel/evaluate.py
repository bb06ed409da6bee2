"""Losses and videos of weights on a recipe's data: `accelerate launch -m wan_accel.evaluate RECIPE [--lora FILE]`.

Without weights named it is the recipe's `model.checkpoint` that is evaluated.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from wan_accel.checkpoint import find_checkpoint
from wan_accel.lora_files import holds_pair
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import get_variant
from wan_accel.parallel.engine import launched_engine
from wan_accel.parallel.names import is_zero
from wan_accel.recipe.commandline import parse_overrides, recipe_parser
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import FusedLora, Recipe, SampleVideos
from wan_accel.sample_drawing import gather
from wan_accel.sample_files import SHEET
from wan_accel.sample_videos import video_sampler
from wan_accel.train import build_trainer
from wan_accel.trained_weights import trained_reader
from wan_accel.trainer import WanTrainer
from wan_accel.validation import as_metrics, fixed_losses
from wan_accel.weights import fuse, open_base

# Weights are merged and held in fp32, whatever dtype a recipe holds a LoRA's frozen base in (they compute in the
# accelerate config's precision, as in training), on cached conditions; no trackers.
OVERRIDES = (
    "method={kind: full}", "model.torch_dtype=float32", "validation.ema=false", "training.report_to=none",
    "data.on_the_fly=[]", "data.augment=null", "data.augment_caption=null",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the losses as one line of JSON; returns the exit code."""
    arguments = parse_overrides(_parser(), argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *OVERRIDES])
        metrics = evaluate(
            recipe, checkpoint=arguments.checkpoint, lora=arguments.lora, ema=arguments.ema,
            draw=arguments.sample, samples=arguments.samples,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if metrics:
        sys.stdout.write(json.dumps(metrics) + "\n")
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(metrics) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser("Print the fixed-noise losses of weights on a recipe's data as one line of JSON.")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="a run's output_dir (its newest checkpoint) or checkpoint-N")
    weights.add_argument("--lora", type=Path, help="a LoRA of any layout, merged into the base weights")
    parser.add_argument("--ema", action="store_true", help="the moving averages of the checkpoint's weights")
    parser.add_argument("--sample", action="store_true", help="draw videos too, as validation.sample says")
    parser.add_argument("--samples", type=Path, help="folder for them (output_dir/samples/<name of the weights>)")
    parser.add_argument("--output", type=Path, help="write the JSON to this file as well")
    return parser


def evaluate(
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    lora: Path | None = None,
    ema: bool = False,
    draw: bool = False,
    samples: Path | None = None,
) -> dict[str, float]:
    """Losses over the recipe's validation draws. Collective; the main rank gets them, others nothing.

    Args:
        recipe: with `validation.every_steps`.
        checkpoint: a run's checkpoint or output_dir.
        lora: an exported LoRA, instead of a checkpoint.
        ema: take the checkpoint's moving averages instead of its weights.
        draw: write videos too, to `output_dir/samples/<name of the weights>`.
        samples: folder to write them to instead; implies `draw`.

    Raises:
        ValueError: no validation in the recipe, an engine that cannot evaluate alone, weights that do not fit, or a
            folder for videos that holds something else.
    """
    if is_zero(launched_engine()):
        raise ValueError("evaluation runs on one process, DDP or FSDP2: use another --config_file")
    if not recipe.validation.every_steps:
        raise ValueError("validation.every_steps is 0, so the recipe has no validation draws: set it, e.g. to 100")
    if checkpoint is not None:
        checkpoint = find_checkpoint(checkpoint)
    elif ema:
        raise ValueError("--ema is of a run's checkpoint: give --checkpoint too (an export with --ema holds averages)")
    if samples is not None:
        samples = Path(os.path.abspath(samples))  # "." has no name to give to what is written
        _check_folder(samples)
    trainer = build_trainer(recipe, _readers(recipe, checkpoint, lora, ema=ema))
    trainer.prepare_evaluation()
    metrics = as_metrics(fixed_losses(trainer, trainer.eval_draws))
    if draw or samples is not None:
        weights = checkpoint or lora or resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
        _draw_videos(trainer, recipe, samples or trainer.output_dir / "samples" / _name_of(weights, ema=ema))
    if not trainer.is_world_process_zero():
        return {}
    return {**metrics, "num_draws": len(trainer.eval_draws)}


def _check_folder(folder: Path) -> None:
    """Drawing again replaces a folder of videos, and must not replace anything else."""
    if folder.exists() and not (folder / SHEET).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--samples {folder} holds something else than videos of an evaluation: give a new folder")


def _name_of(weights: Path, *, ema: bool) -> str:
    """What their videos are called; of "." it is the folder's own name, of a link into the hub's cache the link's."""
    return os.path.basename(os.path.abspath(weights)).removesuffix(".safetensors") + "-ema" * ema


def _readers(
    recipe: Recipe, checkpoint: Path | None, lora: Path | None, *, ema: bool
) -> dict[str, CheckpointReader]:
    """The weights of each expert that the recipe names."""
    variant = get_variant(recipe.variant)
    experts = variant.trained_experts(recipe.model.expert)
    if lora is not None and len(experts) > 1 and lora.exists() and not holds_pair(lora):
        raise ValueError(f"--lora {lora} holds one expert: set model.expert to the one it is for, or use --checkpoint")
    readers: dict[str, CheckpointReader] = {}
    for expert in experts:
        reader = open_base(recipe.model, variant, expert.name)
        if checkpoint is not None:
            reader = trained_reader(checkpoint, reader, variant=variant.name, expert=expert.name, ema=ema)
        elif lora is not None:
            reader = fuse(reader, FusedLora(path=str(lora)), variant, expert.name)
        readers[expert.name] = reader
    return readers


def _draw_videos(trainer: WanTrainer, recipe: Recipe, folder: Path) -> None:
    """Draw on all ranks and write on the main one; here a failure is the user's to see."""
    settings = recipe.validation.sample or SampleVideos()
    sampler = video_sampler(trainer, recipe, settings, folder=folder.parent)
    drawn = gather(sampler.share())
    assert not isinstance(drawn, str)
    if trainer.is_world_process_zero():
        files = sampler.write(folder.name, drawn)
        sys.stderr.write(f"{len(files.videos)} videos in {files.sheet.parent}\n")


if __name__ == "__main__":
    sys.exit(main())
