"""The dataset as a whole, which state.json lists: written from the sidecars, opened and checked. Torch-free."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_accel.data.files import write_json
from wan_accel.data.part_files import Sidecar, finished, place_of, whole_parts
from wan_accel.data.run_file import RUN_FILE, settings_hash
from wan_accel.data.schema import check_schema
from wan_accel.data.store_error import StoreError

if TYPE_CHECKING:
    from datasets import Dataset, Features


def refresh_state(root: Path, features: "Features") -> None:
    """Write state.json and dataset_info.json from the sidecars, each replaced at once."""
    from datasets import DatasetInfo

    info = {key: value for key, value in asdict(DatasetInfo(features=features)).items() if value is not None}
    listed: list[dict[str, str]] = []
    # Until nothing changed meanwhile: of two writers finishing at once, the slower may have seen fewer parts.
    while (files := [{"filename": str(part.relative_to(root))} for part in finished(root)]) != listed:
        write_json(root / "dataset_info.json", info)
        state: dict[str, Any] = {
            "_data_files": files, "_fingerprint": settings_hash({"files": files}), "_format_columns": None,
            "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
        }  # fmt: skip
        write_json(root / "state.json", state)
        listed = files


def listed(root: Path) -> list[str]:
    """The parts that state.json lists, in the order of the dataset's rows, relative to its folder.

    A folder may grow while it is read: processes that are to see the same rows open it with one listing.

    Raises:
        StoreError: there is no such dataset, or it is remote.
    """
    if "://" in str(root):
        raise StoreError(f"{root} is remote: copy it to a local disk first, e.g. `aws s3 sync {root} /data/...`")
    path = Path(root) / "state.json"
    if not path.is_file():
        raise StoreError(f"{root} is not a dataset of wan-accel (no state.json): give the folder that a run wrote")
    return [entry["filename"] for entry in json.loads(path.read_text())["_data_files"]]


def open_parts(root: Path, schema: str, listing: Sequence[str] | None = None) -> dict[Path, Sidecar]:
    """The parts of a dataset that can be read as a whole, in the order of its rows, with their sidecars.

    Args:
        root: the dataset folder.
        schema: what its run file must say.
        listing: the parts to open (`listed`), those that state.json lists now by default.

    Raises:
        StoreError: it does not exist, is empty, remote, or a part is missing or cut short.
        SchemaError: another schema.
    """
    root, names = Path(root), listed(root)
    wanted = [root / name for name in (names if listing is None else listing)]
    found = whole_parts(root)
    places = {place_of(part)[:2] for part in found}
    for part in wanted:
        if part not in found and place_of(part)[:2] in places:
            raise StoreError(f"{part} is being written again: wait for the command that does it, or run it again")
        if part not in found:
            raise StoreError(f"{part} has no sidecar: copy it again, or run the command that made it again")
    if (root / RUN_FILE).is_file():
        check_schema(json.loads((root / RUN_FILE).read_text()).get("schema"), schema, str(root))
    return {part: found[part] for part in wanted}


def load(root: Path, schema: str, *, columns: list[str] | None = None) -> "Dataset":
    """Open a dataset and check it: `datasets.load_from_disk` plus schema and row counts.

    Raises:
        StoreError, SchemaError: as `open_parts`; rows of another schema.
    """
    from datasets import load_from_disk

    expected = _num_rows(root, schema, listed(root))
    dataset = load_from_disk(str(root))
    if len(dataset) != expected:  # a writer may have finished a part meanwhile
        expected = _num_rows(root, schema, [os.path.relpath(file["filename"], root) for file in dataset.cache_files])
    if len(dataset) != expected:
        raise StoreError(f"{root} loads {len(dataset)} rows, its sidecars say {expected}: verify it to find the part")
    for value in dataset.unique("schema"):
        check_schema(value, schema, str(root))
    return dataset.select_columns(columns) if columns is not None else dataset


def _num_rows(root: Path, schema: str, listing: Sequence[str]) -> int:
    """What the sidecars of the parts of a listing say."""
    return sum(sidecar.rows for sidecar in open_parts(root, schema, listing).values())
