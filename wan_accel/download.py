"""Fetch from a hub exactly the checkpoint files that a recipe needs, and open them once they are there."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from wan_accel.hub import HubError, reaching_hub
from wan_accel.models.hub import is_hub_id
from wan_accel.models.layouts import DIFFUSERS_FOLDERS
from wan_accel.models.variants import TOKENIZER_FOLDER, Expert, Variant, get_variant
from wan_accel.recipe.schema import Recipe

_DIT_FILE = r"(config\.json|diffusion_pytorch_model[^/]*\.(safetensors|json))"


def download(recipe: Recipe, *, output: Path | None = None) -> Path:
    """Fetch a recipe's checkpoint: the DiT of its experts, the VAE, umT5 and its tokenizer, CLIP where there is one.

    A hub id in `model.checkpoint` goes to the hub's cache, where the recipe finds it; for a local folder the released
    repository of the variant goes into that folder. What is there already is not fetched again.

    Args:
        recipe: whose checkpoint.
        output: a folder to write instead.

    Returns:
        The folder of the checkpoint.

    Raises:
        HubError: the hub cannot be reached or lacks files, which are named.
        ValueError: the disk is too small, or a file does not open.
    """
    from huggingface_hub import HfApi

    variant, checkpoint = get_variant(recipe.variant), recipe.model.checkpoint
    from_hub = is_hub_id(checkpoint)
    repo_id = checkpoint if from_hub else variant.hub_id
    target = output or (None if from_hub else Path(checkpoint))
    if target is not None and target.is_file():
        raise ValueError(f"model.checkpoint={target} is a file that is there: nothing is to be fetched")
    api, revision = HfApi(), recipe.model.revision
    asked = f"{repo_id}{f' at revision {revision}' if revision else ''} at {api.endpoint}"
    with reaching_hub(f"{asked} cannot be fetched"):
        siblings = api.model_info(repo_id, revision=revision, files_metadata=True).siblings or []
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    experts = variant.trained_experts(recipe.model.expert)
    files = needed_files(list(sizes), variant, experts, repo_id)
    _check_space(target, {name: sizes[name] for name in files})
    with reaching_hub(f"{asked} broke off; the same command goes on"):
        folder = Path(api.snapshot_download(repo_id, revision=revision, local_dir=target, allow_patterns=files))
    _open(folder, variant, experts)
    return folder


def needed_files(names: Sequence[str], variant: Variant, experts: Sequence[Expert], repo_id: str) -> list[str]:
    """The files of a repository, in the original or the diffusers layout, that training on it takes.

    Raises:
        HubError: the repository lacks some; all kinds that it lacks.
    """
    patterns = _patterns(variant, experts, is_diffusers=any(name.startswith("transformer/") for name in names))
    found = {what: [name for name in names if re.fullmatch(pattern, name)] for what, pattern in patterns.items()}
    absent = [f"{what} ({patterns[what]})" for what, files in found.items() if not files]
    if absent:
        raise HubError(f"{repo_id} has no {', no '.join(absent)}: it is not a whole checkpoint of {variant.name}")
    return sorted({name for files in found.values() for name in files})


def _patterns(variant: Variant, experts: Sequence[Expert], *, is_diffusers: bool) -> dict[str, str]:
    """What is needed -> a pattern of its files."""
    from wan_accel.models.checkpoint_files import encoder_files

    if is_diffusers:
        kinds = {"VAE": "vae", "text encoder": "text_encoder", "tokenizer": "tokenizer"}
        kinds |= {"image encoder": "image_encoder"} if variant.dit.clip_dim is not None else {}
        kinds |= {f"DiT ({expert.name})": DIFFUSERS_FOLDERS[expert.name] for expert in experts}
        return {what: rf"{folder}/[^/]+\.(safetensors|json|model|txt)" for what, folder in kinds.items()}
    dit = {f"DiT ({e.name})": re.escape(f"{e.folder}/" if e.folder else "") + _DIT_FILE for e in experts}
    encoders = {name for files in encoder_files(variant).values() for name in files}
    return {**dit, **{name: re.escape(name) for name in encoders}, "tokenizer": rf"{TOKENIZER_FOLDER}/[^/]+"}


def _check_space(target: Path | None, sizes: dict[str, int]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = (target or Path(HF_HUB_CACHE)).absolute()
    there = {name for name in sizes if (place / name).is_file()}
    needed = sum(size for name, size in sizes.items() if name not in there)
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
    if needed > free:
        raise ValueError(
            f"{place}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free: free some, or give "
            "another --output"
        )


def _open(folder: Path, variant: Variant, experts: Sequence[Expert]) -> None:
    """Read the header of every file, which shows one that is cut short."""
    from wan_accel.models.checkpoint_files import check_encoder_files
    from wan_accel.models.loading import dit_folder
    from wan_accel.models.reader import CheckpointReader

    for expert in experts:
        CheckpointReader(dit_folder(folder, variant, expert.name))
    check_encoder_files(folder, variant)
