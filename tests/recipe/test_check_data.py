"""Rules of the `data` section, all problems at once."""

import pytest

from wan_accel.recipe.check import check
from wan_accel.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("name", "overrides", "problems"),
    [
        ("t2v-1.3b/lora", ["data.latents=null"], ["data.latents is missing: the folder of cached conditions"]),
        (
            "t2v-1.3b/lora",
            ["data.datasets=[{path: a, weight: 2}, {path: b}, {path: b}]"],
            [
                "data.latents and data.datasets are both given: remove data.latents to train on the mixture",
                "data.datasets: some have a weight, some not: give all of them one, or none",
                "data.datasets names b twice: raise its weight instead",
            ],
        ),
        (
            "t2v-1.3b/lora",
            ["data.latents=null", "data.datasets=[{path: s3://b/a}]", "data.on_the_fly=[known]", "data.clips=null",
             "data.augment=a:b", "data.augment_caption=a:c"],
            [
                "data.on_the_fly=['known'] needs data.clips",
                "data.on_the_fly works on one folder",
                "data.on_the_fly names known, but t2v-1.3b has no known pixels",
                "data.augment=a:b has no effect: add video",
                "data.augment_caption=a:c has no effect: add text",
                "data.datasets[0].path=s3://b/a is remote",
            ],
        ),
        (
            "animate-14b/lora",
            ["data.on_the_fly=[video]", "data.augment=horizontal_flip"],
            [
                "what is known of the video was cached without it; add known to data.on_the_fly",
                "data.augment=horizontal_flip: the poses and faces of animate-14b would not follow",
            ],
        ),
        ("animate-14b/lora", ["data.on_the_fly=[video, known]", "data.augment=a:b"], []),
        ("t2v-1.3b/lora", ["data.on_the_fly=[video, text]", "data.augment=horizontal_flip"], []),
        ("t2v-1.3b/lora", ["data.latents=null", "data.datasets=[{path: a}, {path: b}]"], []),
    ],
)  # fmt: skip
def test_data_section(name: str, overrides: list[str], problems: list[str]) -> None:
    found = check(load_recipe(name, overrides))
    assert len(found) == len(problems)
    for expected in problems:
        assert any(expected in problem for problem in found), (expected, found)
