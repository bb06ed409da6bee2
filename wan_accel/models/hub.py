"""Checkpoints by hub id: found in the hub's cache on this machine, never fetched while a run starts. Torch-free."""

import re
from pathlib import Path

from wan_accel.models.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# First folders of relative paths, which have the form of a hub id: what the guide and the shipped recipes use.
LOCAL_FOLDERS = ("checkpoints", "models", "output", "runs", "data")
FILE = ".safetensors"  # of a checkpoint that is one file, and never a repository's name


def is_hub_id(checkpoint: str) -> bool:
    """Whether `model.checkpoint` is `owner/name` of a hub and no local path.

    A path that exists, or whose folder does, is local; so is one that begins with `./`, `/` or a usual folder, or that
    names a safetensors file.
    """
    path = Path(checkpoint)
    if path.exists() or path.suffix == FILE or not HUB_ID.fullmatch(checkpoint):
        return False
    return path.parts[0] not in LOCAL_FOLDERS and not path.parent.is_dir()


def resolve_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """The local folder of `model.checkpoint`: as given, or the snapshot in the hub's cache of a hub id.

    Raises:
        CheckpointError: the cache has no such snapshot.
    """
    if not is_hub_id(checkpoint):
        return Path(checkpoint)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No patterns: a snapshot with only the files that a recipe needs is whole for us; readers say what it lacks.
        return Path(snapshot_download(checkpoint, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"model.checkpoint={checkpoint}{at} is neither a local folder nor in the hub's cache: fetch it with "
            "`wan-accel download RECIPE`"
        ) from None
