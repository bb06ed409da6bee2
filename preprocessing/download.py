"""Fetch the networks that Wan2.2-Animate is released with from a hub, and check them against the hub's own hashes."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preprocessing.released_models import (
    RECORD_FILE,
    RELEASED,
    REPOSITORY,
    FileRecord,
    check_files,
    files_of,
    read_record,
    write_record,
)
from preprocessing.video import sha256_file
from wan_accel.hub import HubError, HubUnreachable, reaching_hub
from wan_accel.listing import first_few

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """What the hub says of a file: its sha256 where it is stored as a large one, else git's sha1 of it."""

    path: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


def download(output: Path, names: Sequence[str] = tuple(RELEASED), *, revision: str | None = None) -> list[Path]:
    """Fetch networks into `output`, laid out as in the repository; returns their places.

    What `models.json` lists is only checked again, without the hub (give a revision to ask it). Whole files survive
    an interruption, and so do those that were put there by hand.

    Args:
        output: the folder; `models.json` in it lists every file with its bytes, sha256 and commit.
        names: of `RELEASED`.
        revision: a branch, tag or commit; by default the newest, or what is there.

    Raises:
        HubError: the hub cannot be reached (the message says which files to put where), lacks a file, or sent one
            whose hash is wrong, which is removed.
        ValueError: the disk is too small; models.json is damaged.
    """
    places = [output / RELEASED[name].path for name in names]
    records = read_record(output)
    if revision is None and _are_there(output, names, records):
        return places
    files, commit = _listing(output, names, revision)
    right = _bring(output, files, commit)
    # A network counts when all its files do: else the rest of a folder would not be missed the next time.
    of_network = files_of(names, [file.path for file in files])
    whole = {path for paths in of_network.values() if right.keys() >= {*paths} for path in paths}
    new = {
        file.path: FileRecord(bytes=file.bytes, sha256=right[file.path], revision=commit)
        for file in files
        if file.path in whole
    }
    write_record(output, {**records, **new})
    if wrong := [file for file in files if file.path not in right]:
        raise HubError(_wrong(wrong))
    return places


def check(output: Path) -> list[str]:
    """Compare what is in `output` with its models.json, without the hub; returns what is wrong, one line each.

    Raises ValueError where nothing was downloaded there.
    """
    records = read_record(output)
    if not records:
        raise ValueError(f"{output} has no {RECORD_FILE}: nothing was downloaded there, so there is nothing to compare")
    return check_files(output, records)


def _are_there(output: Path, names: Sequence[str], records: Mapping[str, FileRecord]) -> bool:
    """Whether all the networks were downloaded, and nothing happened to them since."""
    known = files_of(names, list(records))
    wanted = {path: records[path] for paths in known.values() for path in paths}
    return all(known.values()) and not check_files(output, wanted)


def _bring(output: Path, files: Sequence[HubFile], commit: str) -> dict[str, str]:
    """Fetch what is not there; path -> sha256 of the files whose hash is the hub's."""
    right = {file.path: sha256 for file in files if (sha256 := _right(output, file)) is not None}
    missing = [file for file in files if file.path not in right]
    if missing:
        _check_space(output, missing)
        _fetch(output, missing, commit)
        right |= {file.path: sha256 for file in missing if (sha256 := _right(output, file)) is not None}
    return right


def _listing(output: Path, names: Sequence[str], revision: str | None) -> tuple[list[HubFile], str]:
    """The files that make up the networks, and the commit that they are of."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with reaching_hub(f"{REPOSITORY} at {api.endpoint} cannot be fetched"):
            info = api.model_info(REPOSITORY, revision=revision, files_metadata=True)
    except HubUnreachable as error:
        raise HubUnreachable(f"{error}\n{_by_hand(api, output, names, revision)}") from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    of_network = files_of(names, list(siblings))
    if absent := [RELEASED[name].path for name, paths in of_network.items() if not paths]:
        at = f"{REPOSITORY} at revision {revision or 'main'}"
        raise HubError(f"{at} has no {', '.join(absent)}: try another --revision")
    listed = [siblings[path] for paths in of_network.values() for path in paths]
    files = [
        HubFile(path=s.rfilename, bytes=s.size or 0, sha256=s.lfs.sha256 if s.lfs else None, git_sha1=s.blob_id)
        for s in listed
    ]
    return files, str(info.sha)


def _by_hand(api: "HfApi", output: Path, names: Sequence[str], revision: str | None) -> str:
    lines = [f"Fetch these where the hub can be reached, and give `--models {output}` to `animate`:"]
    for name in names:
        released = RELEASED[name]
        kind = "tree" if released.hint else "resolve"
        url = f"{api.endpoint}/{REPOSITORY}/{kind}/{revision or 'main'}/{released.path}"
        hint = f" ({released.hint})" if released.hint else ""
        lines.append(f"  {name}: {url}{hint}\n    to {output / released.path}")
    return "\n".join(lines)


def _check_space(output: Path, files: Sequence[HubFile]) -> None:
    needed = sum(file.bytes for file in files)
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{output}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free: free some, give another "
            "--output, or fetch less with --what"
        )


def _fetch(output: Path, files: Sequence[HubFile], commit: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    with reaching_hub(f"{REPOSITORY} at {api.endpoint} broke off; the same command goes on"):
        api.snapshot_download(
            REPOSITORY, revision=commit, local_dir=output, allow_patterns=[file.path for file in files]
        )


def _right(output: Path, file: HubFile) -> str | None:
    """The sha256 of a file that is what the hub says; None for one that is not there, or wrong: then it is removed.

    Left there, a wrong file would be taken for what was fetched before.
    """
    path = output / file.path
    if not path.is_file():
        return None
    sha256 = sha256_file(path)
    agrees = (sha256 == file.sha256) if file.sha256 else (_git_sha1(path) == file.git_sha1)
    if not agrees:
        path.unlink()
    return sha256 if agrees else None


def _wrong(files: Sequence[HubFile]) -> str:
    removed = [
        f"{file.path} came with another hash than the hub says ({file.sha256 or file.git_sha1}) and was removed"
        for file in files
    ]
    return f"{first_few(removed, _SHOWN, separator='; ')}: run the same command again"


def _git_sha1(path: Path) -> str:
    """git's name of a file's content; files that a hub does not store as large ones have at most some megabytes."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
