"""The TrainingArguments table covers the installed transformers, and fills WanTrainingArguments."""

import dataclasses

from transformers import TrainingArguments

from wan_accel.arguments import WanTrainingArguments
from wan_accel.recipe.arguments import ACCELERATES, ADDED, OURS, PASSED, training_arguments
from wan_accel.recipe.load import load_recipe


def test_every_field_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - PASSED - set(OURS) - ACCELERATES == set()
    assert not PASSED & set(OURS) and not PASSED & ACCELERATES and not ACCELERATES & set(OURS)
    assert fields >= PASSED
    assert {field.name for field in dataclasses.fields(WanTrainingArguments)} - fields >= ADDED


def test_recipe_to_arguments() -> None:
    recipe = load_recipe("animate-14b/lora", ["objective={preset: diffsynth}", "training.output_dir=/tmp/x"])
    arguments = WanTrainingArguments(**training_arguments(recipe), use_cpu=True)
    assert (arguments.density, arguments.shift, arguments.weighting) == ("uniform", 5.0, "bell")
    assert (arguments.global_batch, arguments.micro_batch, arguments.ulysses) == (8, 1, 4)
    assert (arguments.eval_strategy, arguments.eval_steps, arguments.eval_on_start) == ("steps", 250, True)
    assert arguments.max_steps == 2000 and arguments.learning_rate == 1e-4
    assert not arguments.remove_unused_columns and not arguments.logging_nan_inf_filter


def test_the_variant_gives_the_shift() -> None:
    recipe = load_recipe("t2v-a14b/lora")
    assert training_arguments(recipe)["shift"] == 12.0
