"""Upload an export to a model repository of a hub. Torch-free."""

from pathlib import Path

from wan_accel.hub import make_repository, reaching_hub
from wan_accel.models.hub import HUB_ID

CARD = "README.md"


def card_of(output: Path) -> Path:
    """The model card of an export: in its folder, or beside its file."""
    return output.with_suffix(".md") if output.suffix == ".safetensors" else output / CARD


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for a name that no repository can have."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_valid = HUB_ID.fullmatch(repo_id) is not None
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{repo_id!r} is no name of a repository on a hub: give OWNER/NAME")


def push(output: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an export, a folder or a file with its card, to a model repository; returns its address.

    The repository is made if need be. The same call goes on after an interruption: files that are there are not sent
    again.

    Args:
        output: what `wan-accel export` wrote.
        repo_id: `owner/name` of the repository.
        private: make it readable by its owner only.

    Raises:
        ValueError: `output` is no export, or `repo_id` no name.
        HubError: the hub refuses or cannot be reached, or the repository is public where private was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo_id(repo_id)
    if not (output.exists() and card_of(output).is_file()):
        raise ValueError(f"{output} is no export ({card_of(output)} is not there): give what `wan-accel export` wrote")
    api, message = HfApi(), "Add an export of wan-accel"
    with reaching_hub(f"{repo_id} at {api.endpoint} cannot be pushed to"):
        make_repository(repo_id, "model", private=private)
        if output.is_dir():
            api.upload_folder(repo_id=repo_id, folder_path=output, commit_message=message)
        else:
            files = {output.name: output, CARD: card_of(output)}
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            api.create_commit(repo_id, operations, commit_message=message)
    return f"{api.endpoint}/{repo_id}"
