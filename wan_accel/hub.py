"""Talk to a hub: its failures as one sentence, uploads of exports."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CARD = "README.md"


class HubError(ValueError):
    """What a hub would not do: what was asked, what it answered, what to do."""


@contextmanager
def reaching_hub(what: str) -> Iterator[None]:
    """Turn every way in which a hub can fail into one sentence; errors of the local disk pass.

    Raises:
        HubError: the hub refuses, does not answer, or must not be asked.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The base class of all errors of httpx or httpx2, whichever the installed version uses.
    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(f"{what} ({_reason(error)}); HF_TOKEN says who asks") from error
    except (transport_error, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{what} ({_reason(error)}); HF_ENDPOINT names another hub") from error


def _reason(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return ". ".join(lines[:2]) or type(error).__name__


def card_of(output: Path) -> Path:
    """The model card of an export: in its folder, or beside its file."""
    return output.with_suffix(".md") if output.suffix == ".safetensors" else output / CARD


def push(output: Path, repo_id: str) -> str:
    """Upload an export, a folder or a file with its card, to a model repository; returns its address.

    The repository is made if need be. The export stays where it is, so the upload can be tried again.

    Raises:
        HubError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, message = HfApi(), "Add an export of wan-accel"
    with reaching_hub(f"{output} is written, but {repo_id} at {api.endpoint} cannot be pushed to"):
        api.create_repo(repo_id, exist_ok=True)
        if output.is_dir():
            api.upload_folder(repo_id=repo_id, folder_path=output, commit_message=message)
        else:
            files = {output.name: output, CARD: card_of(output)}
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            api.create_commit(repo_id, operations, commit_message=message)
    return f"{api.endpoint}/{repo_id}"
