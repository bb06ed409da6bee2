"""Strict YAML: every problem at once, with its place; inheritance and overrides."""

from pathlib import Path

import pytest
import yaml

from wan_accel.arguments import WanTrainingArguments
from wan_accel.recipe.arguments import training_arguments
from wan_accel.recipe.load import RecipeError, find_recipe, load_recipe, shipped_recipes, to_yaml

GOOD = """\
variant: t2v-1.3b
model: {checkpoint: weights}
method: {kind: lora}
data:
  latents: data
training:
  output_dir: out
  learning_rate: 1e-4
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_defaults_and_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.training["learning_rate"] == 1e-4  # YAML 1.1 would make it a string
    assert (recipe.method.r, recipe.data.global_batch.samples, recipe.parallel.ulysses) == (32, 1, 1)


def test_three_mistakes_in_one_error(tmp_path: Path) -> None:
    text = GOOD.replace("checkpoint: weights", "chekpoint: weights").replace("kind: lora", "kind: loraa") + "fsdp: 1\n"
    path = write(tmp_path, text + "data: {latents: again}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert f"{path}:10: data: given twice" in lines
    assert f"{path}:2: model.chekpoint: unknown key (did you mean checkpoint?)" in lines
    assert f"{path}:2: model.checkpoint: missing" in lines
    assert any(
        line.startswith(f"{path}:3: method.kind: Input should be 'lora' or 'full', got 'loraa'") for line in lines
    )
    assert any(line.startswith(f"{path}:9: fsdp: unknown key") for line in lines)


def test_arguments_that_belong_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  gradient_checkpointing: true\n  bf16: true\n  learning_rates: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}:9: training.gradient_checkpointing: belongs to memory.activation_checkpointing",
        f"{path}:10: training.bf16: belongs to the accelerate config (--config_file)",
        f"{path}:11: training.learning_rates: unknown key (did you mean learning_rate?)",
    ]


def test_base(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "parent.yaml")
    child = write(tmp_path, "base: parent.yaml\ntraining: {learning_rate: 2}\nmethod: {r: 8}\n")
    recipe = load_recipe(child)
    assert (recipe.training, recipe.method.r, recipe.method.kind) == (
        {"output_dir": "out", "learning_rate": 2}, 8, "lora",
    )  # fmt: skip
    assert load_recipe(write(tmp_path, "base: t2v-1.3b/lora\nmethod: {r: 4}\n")).method.r == 4
    write(tmp_path, "base: recipe.yaml\n", "parent.yaml")
    write(tmp_path, "base: parent.yaml\n")
    with pytest.raises(RecipeError, match="`base` goes in a circle"):
        load_recipe(child)


def test_a_mistake_in_the_base_names_the_base(tmp_path: Path) -> None:
    parent = write(tmp_path, GOOD.replace("kind: lora", "kind: x"), "parent.yaml")
    with pytest.raises(RecipeError, match=rf"{parent}:3: method\.kind"):
        load_recipe(write(tmp_path, "base: parent.yaml\n"))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["training.max_steps=7", "--parallel.ulysses", "2", "method={kind: full}"])
    assert (recipe.training["max_steps"], recipe.parallel.ulysses, recipe.method.kind) == (7, 2, "full")
    with pytest.raises(RecipeError, match=r"override parallel.ulyses: parallel.ulyses: unknown key"):
        load_recipe(path, ["parallel.ulyses=2"])
    with pytest.raises(RecipeError, match=r"'training.max_steps' has no value"):
        load_recipe(path, ["training.max_steps"])


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean animate-14b/lora\?"):
        find_recipe("animate-14b/loro")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, "- 1\n"))
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(write(tmp_path, "a: [\n"))


def test_resolved_recipe_loads_again(tmp_path: Path) -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        again = write(tmp_path, to_yaml(recipe))
        assert load_recipe(again) == recipe
        assert yaml.safe_load(to_yaml(recipe))["variant"] == recipe.variant


def test_strategies_by_epoch_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"training\.save_strategy: epoch is not supported: use steps"):
        load_recipe("t2v-1.3b/lora", ["training.save_strategy=epoch"])


@pytest.mark.parametrize("text", ["no", "'no'", "No"])
def test_a_strategy_of_no_is_read_as_written(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes it for false, in a file and in an override."""
    lines = f"base: t2v-1.3b/lora\ntraining: {{save_strategy: {text}, logging_strategy: {text}}}\n"
    for recipe in (
        load_recipe(write(tmp_path, lines)),
        load_recipe("t2v-1.3b/lora", [f"training.save_strategy={text}", "--training.logging_strategy", text]),
    ):
        assert (recipe.training["save_strategy"], recipe.training["logging_strategy"]) == ("no", "no")
        assert yaml.safe_load(to_yaml(recipe))["training"]["save_strategy"] == "no"
        arguments = WanTrainingArguments(**training_arguments(recipe), use_cpu=True)
        assert (arguments.save_strategy, arguments.logging_strategy) == ("no", "no")
