"""Rules of the recipe's `data` section: folders, mixtures, conditions encoded on the fly. Torch-free."""

from wan_accel.models.variants import Variant
from wan_accel.recipe.schema import Data, Recipe


def check_data(recipe: Recipe, variant: Variant) -> list[str]:
    """Every problem of `data` and `cache`, one line each."""
    data = recipe.data
    return [*_check_folders(data), *_check_on_the_fly(data, variant)]


def _check_folders(data: Data) -> list[str]:
    problems = []
    if data.latents is None and not data.datasets:
        problems.append("data.latents is missing: the folder of cached conditions (or data.datasets: several)")
    if data.latents is not None and data.datasets:
        problems.append(
            "data.latents and data.datasets are both given: remove data.latents to train on the mixture, or "
            "data.datasets to train on one folder"
        )
    weights = [part.weight for part in data.datasets]
    if None in weights and any(weight is not None for weight in weights):
        problems.append("data.datasets: some have a weight, some not: give all of them one, or none")
    paths = [part.path for part in data.datasets]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        problems.append(f"data.datasets names {path} twice: raise its weight instead")
    return problems


def _check_on_the_fly(data: Data, variant: Variant) -> list[str]:
    kinds, problems = set(data.on_the_fly), []
    if kinds and data.clips is None:
        problems.append(f"data.on_the_fly={data.on_the_fly} needs data.clips: the clips that are encoded")
    if kinds and data.datasets:
        problems.append("data.on_the_fly works on one folder: give data.latents instead of data.datasets")
    if "known" in kinds and "known" not in variant.conditioning:
        problems.append(f"data.on_the_fly names known, but {variant.name} has no known pixels: remove it")
    if data.augment is not None and "video" not in kinds:
        problems.append(f"data.augment={data.augment} has no effect: add video to data.on_the_fly")
    if data.augment_caption is not None and "text" not in kinds:
        problems.append(f"data.augment_caption={data.augment_caption} has no effect: add text to data.on_the_fly")
    if data.augment is not None and "first_frame" in variant.conditioning:
        problems.append(
            f"data.augment={data.augment}: {variant.name} is given the first frame as it was cached, which would "
            "contradict an augmented video: remove it"
        )
    if data.augment is not None and variant.has_animate_adapter:
        if "known" not in kinds:
            problems.append(
                f"data.augment={data.augment}: what is known of the video was cached without it; add known to "
                "data.on_the_fly"
            )
        if data.augment == "horizontal_flip":
            problems.append(
                f"data.augment=horizontal_flip: the poses and faces of {variant.name} would not follow; use a function "
                "that leaves shapes where they are"
            )
    return problems
