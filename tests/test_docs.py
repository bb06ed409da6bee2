import dataclasses
from pathlib import Path

import pytest

from preprocessing.types import PreprocessProfile
from wan_accel.data.schema import QUALITY
from wan_accel.models.variants import VARIANTS, Variant
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.settings import REFUSED
from wan_accel.recipe.arguments import DEFAULTS

GUIDE = (Path(__file__).parents[1] / "docs/ANIMATE_PREPROCESSING.md").read_text()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PreprocessProfile)])
def test_every_field_of_the_profile_is_explained(name):
    assert f"\n| {name} | " in GUIDE


@pytest.mark.parametrize("name", QUALITY)
def test_every_quality_figure_is_explained(name):
    assert f"\n| {name} | " in GUIDE


@pytest.mark.parametrize("name", ["ANIMATE_PREPROCESSING", "BENCHMARKS"])
def test_pictures_exist(name):
    docs = Path(__file__).parents[1] / "docs"
    pictures = [part.split(")")[0] for part in (docs / f"{name}.md").read_text().split("](images/")[1:]]
    assert pictures
    for picture in pictures:
        assert (docs / "images" / picture).is_file()


@pytest.mark.parametrize("key", [row.key for row in REFUSED])
def test_every_refused_field_of_an_accelerate_config_is_named(key: str):
    guide = (Path(__file__).parents[1] / "docs/MULTI_GPU_TRAINING.md").read_text()
    assert f"`{key}`" in guide.split("## The accelerate config")[1].split("\n## ")[0]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_explained(variant: Variant):
    training = (Path(__file__).parents[1] / "docs/TRAINING.md").read_text()
    row = next(line for line in training.splitlines() if line.startswith(f"| `{variant.name}` | "))
    assert f"| {variant.hub_id} |" in row
    assert row.endswith(f"| {variant.shift:g}, {variant.num_frames}, {variant.fps:g} |")


def test_every_default_of_ours_is_explained():
    training = (Path(__file__).parents[1] / "docs/TRAINING.md").read_text()
    for name, value in DEFAULTS.items():
        shown = str(value).lower() if isinstance(value, bool) else f"`{value}`" if isinstance(value, str) else value
        assert f"| `{name}` | {shown} | " in training


def test_the_degrees_in_the_guide_are_those_that_divide_the_heads():
    training = (Path(__file__).parents[1] / "docs/TRAINING.md").read_text().replace("\n", " ")
    for heads in {variant.dit.num_heads for variant in VARIANTS.values()}:
        *first, last = map(str, usable_degrees(heads))
        assert f"({heads} for " in training or f"; {heads} for " in training
        assert f"{', '.join(first)} or {last}" in training
