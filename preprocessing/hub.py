"""A clips dataset on a hub: pushed as the folder that `export --layout parquet` makes, fetched as one."""

from pathlib import Path

from preprocessing.export_parquet import DATA_FOLDER
from wan_accel.data.store import RUN_FILE
from wan_accel.hub import HubError, make_repository, reaching_hub

_OURS = [RUN_FILE, f"{DATA_FOLDER}/.*"]  # for resuming an export: no part of the dataset


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
        make_repository(repo_id, "dataset", private=private)
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
