"""A clips dataset on a hub: pushed as the folder that `export --layout parquet` makes, fetched as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preprocessing.export_parquet import DATA_FOLDER
from wan_accel.data.store import RUN_FILE

_OURS = [RUN_FILE, f"{DATA_FOLDER}/.*"]  # for resuming an export: no part of the dataset


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


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload an exported folder to a dataset repository, which is made if need be; returns its address.

    The same call goes on after an interruption: files that are there are not sent again.

    Args:
        folder: what `export_parquet` wrote.
        repo_id: `user/name` of the repository.
        private: make it readable by its owner only; otherwise as the owner's repositories are.
        revision: a branch, by default `main`; one that is not there begins without the files of the others.

    Raises:
        HubError: the hub refuses or cannot be reached; it holds shards of another export, or is public where private
            was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with reaching_hub(f"{repo_id} at {api.endpoint} cannot be pushed to"):
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        if private and not api.dataset_info(repo_id).private:
            raise HubError(f"{repo_id} is there already and public: make it private on the hub, or leave --private out")
        if revision is not None:
            first = api.list_repo_commits(repo_id, repo_type="dataset")[-1].commit_id
            api.create_branch(repo_id, branch=revision, revision=first, repo_type="dataset", exist_ok=True)
        there = set(api.list_repo_files(repo_id, repo_type="dataset", revision=revision))
        ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}
        if foreign := sorted(file for file in there - ours if file.endswith(".parquet")):
            raise HubError(
                f"{repo_id} holds {foreign[0]}, which is not of this export: choose another --repo-id or --revision, "
                "or remove its data/ there"
            )
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type="dataset", revision=revision, ignore_patterns=list(_OURS),
            commit_message=f"Add clips in {len(ours)} shards",
        )  # fmt: skip
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{revision}" if revision else "")


def fetch(repo_id: str, *, revision: str | None = None) -> Path:
    """Download the shards of a dataset repository into the hub's cache; returns the folder that holds them.

    Raises HubError where there are none, or where the hub refuses or cannot be reached and they are not in the cache.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with reaching_hub(f"{repo_id} at {api.endpoint} cannot be fetched"):
        folder = Path(
            api.snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=[f"{DATA_FOLDER}/*"])
        )
    if not (folder / DATA_FOLDER).is_dir():
        raise HubError(f"{repo_id} at {api.endpoint} holds no {DATA_FOLDER}/: `export --layout hub` did not push it")
    return folder
