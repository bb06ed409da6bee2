"""Fixed-noise loss of weights on a recipe's data: `accelerate launch -m wan_accel.evaluate RECIPE [--lora FILE]`."""

import json
import logging
import sys
from pathlib import Path

from wan_accel.assemble import launched_engine
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import get_variant
from wan_accel.recipe.commandline import parse_overrides, recipe_parser
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import FusedLora, Recipe
from wan_accel.train import build_trainer
from wan_accel.validation import as_metrics, fixed_losses
from wan_accel.weights import fuse, open_base


def main(argv: list[str] | None = None) -> int:
    """Print the loss as one line of JSON; returns the exit code."""
    parser = recipe_parser("Print the fixed-noise loss of weights on a recipe's data as one line of JSON.")
    parser.add_argument("--lora", type=Path, help="a LoRA of any layout, merged into the base weights")
    parser.add_argument("--output", type=Path, help="write the JSON to this file as well")
    arguments = parse_overrides(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, "method={kind: full}", "training.report_to=none"])
        metrics = evaluate(recipe, arguments.lora)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if metrics:
        sys.stdout.write(json.dumps(metrics) + "\n")
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(metrics) + "\n")
    return 0


def evaluate(recipe: Recipe, lora: Path | None) -> dict[str, float]:
    """Losses over the recipe's validation draws. Collective; the main rank gets them, others nothing.

    Raises:
        ValueError: no validation in the recipe, an engine that cannot evaluate alone, or weights that do not fit.
    """
    if launched_engine() == "zero3":
        raise ValueError("evaluation runs on one process, DDP or FSDP2: use another --config_file")
    if not recipe.validation.every_steps:
        raise ValueError("validation.every_steps is 0, so the recipe has no validation draws: set it, e.g. to 100")
    variant = get_variant(recipe.variant)
    readers: dict[str, CheckpointReader] = {}
    for row in variant.trained_experts(recipe.model.expert):
        readers[row.name] = open_base(recipe.model, variant, row.name)
        if lora is not None:
            readers[row.name] = fuse(readers[row.name], FusedLora(path=str(lora)), variant, row.name)
    trainer = build_trainer(recipe, readers)
    metrics = as_metrics(fixed_losses(trainer, trainer.eval_draws))
    if not trainer.is_world_process_zero():
        return {}
    return {**metrics, "num_draws": len(trainer.eval_draws)}


if __name__ == "__main__":
    sys.exit(main())
