"""Talk to a hub: its failures as one sentence, repositories to push to. Torch-free."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class HubError(ValueError):
    """What a hub would not do: what was asked, what it answered, what to do."""


class HubUnreachable(HubError):
    """A hub that does not answer, or must not be asked (HF_HUB_OFFLINE)."""


@contextmanager
def reaching_hub(what: str) -> Iterator[None]:
    """Turn every way in which a hub can fail into one sentence.

    Raises HubError for what it answers, HubUnreachable where it does not; errors of the local disk pass.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The base class of all errors of httpx or httpx2, whichever the installed version uses.
    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(f"{what} ({_reason(error)}); HF_TOKEN says who asks") from error
    except (transport_error, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubUnreachable(f"{what} ({_reason(error)}); HF_ENDPOINT names another hub") from error


def _reason(error: Exception) -> str:
    """The first lines of a hub's message: what went wrong, and with which address."""
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return ". ".join(lines[:2]) or type(error).__name__


def make_repository(repo_id: str, repo_type: Literal["model", "dataset"], *, private: bool) -> None:
    """Make a repository to push to, if it is not there.

    Args:
        repo_id: `owner/name`.
        repo_type: what it is for.
        private: readable by its owner only; otherwise as the owner's repositories are.

    Raises:
        HubError: it is there already and public where private was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise HubError(f"{repo_id} is there already and public: make it private on the hub, or leave --private out")
