"""Fetch from a hub exactly the checkpoint files that a recipe needs, and open them once they are there."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_accel.disk import free_bytes
from wan_accel.hub import HubError, reaching_hub
from wan_accel.models.hub import FILE, is_hub_id
from wan_accel.models.layouts import DIFFUSERS_FOLDERS, TOKENIZER, encoder_folder, is_diffusers
from wan_accel.models.variants import TOKENIZER_FOLDER, Expert, Variant, get_variant
from wan_accel.recipe.schema import Recipe

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

logger = logging.getLogger(__name__)

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
        ValueError: the target is no folder, the disk is too small, or a file does not open.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    variant, checkpoint = get_variant(recipe.variant), recipe.model.checkpoint
    from_hub = is_hub_id(checkpoint)
    repo_id = checkpoint if from_hub else variant.hub_id
    target = output or (None if from_hub else Path(checkpoint))
    if target is not None:
        _check_target(target, "--output" if output is not None else "model.checkpoint")
    api, revision = HfApi(), recipe.model.revision
    asked = f"{repo_id}{f' at revision {revision}' if revision else ''} at {api.endpoint}"
    with reaching_hub(f"{asked} cannot be fetched"):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    experts = variant.trained_experts(recipe.model.expert)
    files = needed_files(list(sizes), variant, experts, repo_id)
    missing = [name for name in files if not _is_there(info, name, sizes[name], target)]
    _check_space(target or Path(HF_HUB_CACHE), {name: sizes[name] for name in files}, missing)
    with reaching_hub(f"{asked} broke off; the same command goes on"):
        folder = Path(api.snapshot_download(repo_id, revision=revision, local_dir=target, allow_patterns=files))
    _open(folder, variant, experts)
    return folder


def _check_target(target: Path, name: str) -> None:
    """Refuse what is a file or is called like one: a checkpoint that is fetched is a folder."""
    if target.is_file():
        raise ValueError(f"{name}={target} is a file that is there: nothing is to be fetched")
    if target.suffix == FILE and not target.exists():
        raise ValueError(
            f"{name}={target} names a file, and a checkpoint that is fetched is a folder: give a folder or a hub id, "
            "or copy the file there"
        )


def needed_files(names: Sequence[str], variant: Variant, experts: Sequence[Expert], repo_id: str) -> list[str]:
    """The files of a repository, in the original or the diffusers layout, that training on it takes.

    Raises:
        HubError: the repository lacks some; all kinds that it lacks.
    """
    patterns = _patterns(variant, experts, diffusers=is_diffusers(names))
    found = {what: [name for name in names if re.fullmatch(pattern, name)] for what, pattern in patterns.items()}
    absent = [f"{what} ({patterns[what]})" for what, files in found.items() if not files]
    if absent:
        raise HubError(f"{repo_id} has no {', no '.join(absent)}: it is not a whole checkpoint of {variant.name}")
    return sorted({name for files in found.values() for name in files})


def _patterns(variant: Variant, experts: Sequence[Expert], *, diffusers: bool) -> dict[str, str]:
    """What is needed -> a pattern of its files."""
    from wan_accel.models.checkpoint_files import TOKENIZER_FILE, encoder_files

    encoders = {name for files in encoder_files(variant).values() for name in files} - {TOKENIZER_FILE}
    if diffusers:
        kinds = {name: name for name in (TOKENIZER, *map(encoder_folder, encoders))}
        kinds |= {f"DiT ({expert.name})": DIFFUSERS_FOLDERS[expert.name] for expert in experts}
        return {what: rf"{folder}/[^/]+\.(safetensors|json|model|txt)" for what, folder in kinds.items()}
    dit = {f"DiT ({e.name})": re.escape(f"{e.folder}/" if e.folder else "") + _DIT_FILE for e in experts}
    return {**dit, **{name: re.escape(name) for name in encoders}, "tokenizer": rf"{TOKENIZER_FOLDER}/[^/]+"}


def _is_there(info: "ModelInfo", name: str, size: int, target: Path | None) -> bool:
    """Whether a file need not be fetched: it is in the folder, or else in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if target is None:
        return isinstance(try_to_load_from_cache(info.id, name, revision=info.sha), str)
    return (target / name).is_file() and (target / name).stat().st_size == size


def _check_space(place: Path, sizes: dict[str, int], missing: Sequence[str]) -> None:
    """Say how much is to be fetched, after a look at what is free."""
    needed, whole = sum(sizes[name] for name in missing), sum(sizes.values())
    free = free_bytes(place)
    if needed > free:
        raise ValueError(
            f"{place}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free: free some, or give "
            "another --output"
        )
    counts = len(missing), len(sizes), needed / 1e9, whole / 1e9
    logger.info("%s: %d of %d files are to be fetched, %.2f of %.2f GB", place, *counts)


def _open(folder: Path, variant: Variant, experts: Sequence[Expert]) -> None:
    """Read the header of every file, which shows one that is cut short."""
    from wan_accel.models.checkpoint_files import check_encoder_files
    from wan_accel.models.loading import dit_folder
    from wan_accel.models.reader import CheckpointReader

    for expert in experts:
        CheckpointReader(dit_folder(folder, variant, expert.name))
    check_encoder_files(folder, variant)
