"""Several clips datasets become one: their parts linked side by side, nothing decoded or copied unless asked for."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from preprocessing.leases import living_jobs
from preprocessing.status import read_status
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA


def merge(datasets: Sequence[Path], output: Path, *, copy: bool = False, incomplete: bool = False) -> int:
    """Make `output` the union of clips datasets; returns its number of clips.

    Parts are hard links, which share the disk's space with the originals; `copy` makes the result independent, or
    reach another disk. Running again after an interruption goes on.

    Args:
        datasets: folders with different clips and the same columns.
        output: a new folder, or one that the same merge began.
        copy: copy instead of linking.
        incomplete: accept datasets whose run has not finished.

    Raises:
        StoreError: a dataset is damaged, unfinished or still written to, columns differ, a clip is in two of them, or
            `output` lies on another disk and `copy` is off. Nothing is written then.
    """
    if len({path.resolve() for path in datasets}) != len(datasets):
        raise store.StoreError("a dataset is given twice: give each once")
    problems = [] if incomplete else [problem for path in datasets for problem in _unfinished(path)]
    if problems:
        raise store.StoreError("; ".join(problems) + ": finish the runs, or merge as they are with --incomplete")
    opened = {path: store.load(path, CLIPS_SCHEMA) for path in datasets}
    first = next(iter(opened))
    for path, dataset in opened.items():
        if dataset.features != opened[first].features:
            there, here = opened[first].features, dataset.features
            different = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
            raise store.StoreError(
                f"{path} has other columns than {first} ({', '.join(different)}): merge clips of one kind"
            )
    _refuse_duplicates(datasets)
    merged = {"merged": sorted(str(path.resolve()) for path in datasets)}
    store.claim_output(output, schema=CLIPS_SCHEMA, settings=merged)
    for number, path in enumerate(datasets):
        for part in store.parts(path):
            _place(part, output / "parts" / f"{number:03}-{part.parent.name}", copy=copy)
    store.refresh_state(output, opened[first].features)
    return len(store.load(output, CLIPS_SCHEMA))


def _unfinished(dataset: Path) -> list[str]:
    if jobs := living_jobs(dataset):
        return [f"{dataset} is being written by {', '.join(jobs)}"]
    status = read_status(dataset)
    missing = status.num_videos - status.finished - status.rejected
    return [f"{dataset} lacks {missing} of its {status.num_videos} videos"] if missing else []


def _refuse_duplicates(datasets: Sequence[Path]) -> None:
    where: dict[str, Path] = {}
    for path in datasets:
        for name in store.each_id(path, "clip_id"):
            if name in where:
                both = f"{where[name]} and {path}" if where[name] != path else f"{path} twice"
                raise store.StoreError(f"clip {name} is in {both}: merge datasets of different clips")
            where[name] = path


def _place(part: Path, folder: Path, *, copy: bool) -> None:
    """Link or copy a part, then its sidecar: without it, it does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (part, part.with_name(part.name + ".json")):
        target = folder / source.name
        if target.exists():
            continue
        if copy:
            temporary = target.with_name(target.name + ".tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
            continue
        try:
            os.link(source, target)
        except OSError as error:
            raise store.StoreError(f"{part} cannot be linked into {folder} ({error.strerror}): use --copy") from error
