"""Checkpoints of a run: written beside, renamed when complete, loaded on any number of ranks (FSDP2 and DDP).

checkpoint-<step>/
  manifest.json            format, engine, step, what is trained; written last
  model/                   torch.distributed.checkpoint: trained weights and optimizer (single, DDP, FSDP2)
  zero/<expert>/           DeepSpeed's own format (ZeRO-2, ZeRO-3)
  ema/                     moving averages of the trained weights, if the run keeps them (wan_accel.ema)
  trainer_state.json  scheduler.pt  rng_state*.pth  recipe.yaml
"""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_accel.disk import free_bytes
from wan_accel.ema import ema_tensors
from wan_accel.file_sums import FileSum, wrong_sizes
from wan_accel.listing import first_few
from wan_accel.models.variants import BOTH
from wan_accel.optimizers import state_bytes
from wan_accel.parallel.agreement import from_main_rank
from wan_accel.parallel.names import Engine, is_zero
from wan_accel.stored_tensors import ReadTensor, dcp_tensors, zero_tensors

logger = logging.getLogger("wan_accel")
FORMAT = "wan-accel/checkpoint@1"
MANIFEST = "manifest.json"


_FP32 = 4


class NoSpaceError(ValueError):
    """The disk cannot hold another checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds. `trained` maps names of trained tensors to shapes.

    data: digest of the rows that it was trained on. settings: what else decides the samples, the loss and their order.
    files: path inside the folder -> bytes and xxh3_128 of its content, of all files but the manifest.
    All three are None in checkpoints of versions before they were recorded.
    """

    engine: Engine
    step: int
    variant: str
    expert: str
    method: str
    base: str
    lora: dict[str, Any] | None
    world_size: int
    ulysses: int
    trained: dict[str, list[int]]
    data: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    files: dict[str, tuple[int, str]] | None = None
    format: str = FORMAT


def read_sums(folder: Path) -> dict[str, FileSum]:
    """Sizes and checksums of a checkpoint's files by their relative paths.

    Raises:
        ValueError: see `read_manifest`, or it was written before checksums were recorded.
    """
    manifest = read_manifest(folder)
    if manifest.files is None:
        raise ValueError(f"{folder} was written by a version that kept no checksums: it can be loaded, not verified")
    return _sums(asdict(manifest))


def _sums(fields: Mapping[str, Any]) -> dict[str, FileSum]:
    return {name: FileSum(size, digest) for name, (size, digest) in (fields.get("files") or {}).items()}


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: the folder is no complete checkpoint, or one of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint (no {MANIFEST}): choose another one of the same run")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): choose another checkpoint of the same run") from error
    if fields.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {fields.get('format')!r}, this version reads {FORMAT!r}")
    known = {field.name for field in dataclasses.fields(Manifest)}  # a later version may add what we can do without
    return Manifest(**{name: value for name, value in fields.items() if name in known})


def other_data(folder: Path, saved: Manifest, current: Manifest) -> str | None:
    """What to say where a checkpoint was trained on other rows than those that there are now; None for the same."""
    if saved.data is None or current.data is None or saved.data == current.data:
        return None
    return (
        f"the data changed since {folder} was written ({saved.data['rows']} rows then, {current.data['rows']} now; "
        f"clips, captions, data.where or weights): training goes on, with other samples from step {saved.step} on "
        "than without the stop"
    )


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: every file that the manifest names is there, with its size.

    A save that was torn has no manifest; what a disk lost later shows in the sizes (and is logged), or is found by
    `wan-accel checkpoint verify`, which reads everything.
    """
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    found = [path for path in numbered if (path / MANIFEST).is_file() and not _is_damaged(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_damaged(folder: Path) -> bool:
    try:
        problems = wrong_sizes(folder, _sums(json.loads((folder / MANIFEST).read_text())))
    except json.JSONDecodeError as error:
        problems = [f"{MANIFEST} is no JSON ({error})"]
    if problems:
        logger.warning("%s is damaged and left out: %s", folder, first_few(problems, 3, separator="; "))
    return bool(problems)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none."""
    checkpoints = complete_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest complete one of a run.

    Raises:
        ValueError: neither.
    """
    found = path if (path / MANIFEST).is_file() else last_checkpoint(path)
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint: give a run's output_dir or a checkpoint-N folder")
    return found


def check_space(
    output_dir: Path,
    trained: Mapping[str, Sequence[int]],
    *,
    optim: str,
    has_ema: bool = False,
    engine: Engine = "single",
) -> None:
    """Check that the disk holds a checkpoint of these tensors, before anything is written.

    Args:
        output_dir: of the run.
        trained: name -> shape.
        optim: `training.optim`, whose state is in it.
        has_ema: moving averages are, too.
        engine: that writes it.

    Raises:
        NoSpaceError: it does not. Checkpoints that are there already are untouched.
    """
    # fp32 weights, averages, and the optimizer's state; the rest of a checkpoint is small. Under ZeRO-2 the weights of
    # the forward pass lie beside their masters, in fp32 at most.
    weights = _FP32 * (1 + has_ema + (engine == "zero2"))
    needed = sum(weights * math.prod(shape) + state_bytes(optim, shape) for shape in trained.values())
    free = free_bytes(output_dir)
    if needed > free:
        raise NoSpaceError(
            f"training.output_dir={output_dir}: a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB "
            "are free. Free some and run the same command again: it goes on from the newest complete checkpoint"
        )


def start(output_dir: Path, step: int) -> Path:
    """Create the empty folder that a checkpoint is written to before it is renamed. Collective.

    Raises:
        OSError: on all ranks, it cannot be created.
    """
    folder = output_dir / f"checkpoint-{step}.tmp"
    return from_main_rank(lambda: _make_empty(folder))


def _make_empty(folder: Path) -> Path:
    if folder.exists():  # of a save that was torn
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, manifest: Manifest, *, keep: int | None) -> Path:
    """Rename a written checkpoint into place, then delete the oldest beyond `keep`. One rank, after all have written.

    The newest complete checkpoint is never deleted, whatever `keep` says. What torn saves have left is.
    """
    final = folder.with_name(folder.name.removesuffix(".tmp"))
    with (folder / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(place)
    if final.exists():  # the same step saved again, e.g. after a resume
        _set_aside(final)
    folder.rename(final)
    _sync(final.parent)
    for old in complete_checkpoints(final.parent)[: -max(keep, 1)] if keep else []:
        _set_aside(old)
    for torn in final.parent.glob("checkpoint-*.tmp"):
        shutil.rmtree(torn)
    return final


def _set_aside(folder: Path) -> None:
    """Let a checkpoint count as torn before its files are deleted one by one, which may be cut short."""
    folder.rename(folder.with_name(f"{folder.name}.old.tmp"))


def _sync(folder: Path) -> None:
    """Flush a folder's own list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def zero_folder(folder: Path, expert: str) -> Path:
    """Where an expert's engine writes; engines of a pair do not share a folder."""
    return folder / "zero" / expert


def open_trained(folder: Path, manifest: Manifest, *, ema: bool = False) -> ReadTensor:
    """Read a checkpoint's trained tensors one at a time, on one process: name in the manifest -> fp32 tensor.

    Args:
        folder: a complete checkpoint.
        manifest: the folder's.
        ema: read their moving averages instead of the weights (of which engines' fp32 masters are read).

    Raises:
        ValueError: the checkpoint is damaged, or has no moving average.
    """
    if ema:
        return ema_tensors(folder, manifest.trained)
    if not is_zero(manifest.engine):
        return dcp_tensors(folder / "model", "model")
    if manifest.expert != BOTH:
        return zero_tensors({"": zero_folder(folder, manifest.expert)})
    experts = sorted({name.split(".")[0] for name in manifest.trained})
    return zero_tensors({f"{expert}.": zero_folder(folder, expert) for expert in experts})


def read_trained(folder: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's trained tensors whole; see `open_trained`."""
    manifest = read_manifest(folder)
    read = open_trained(folder, manifest, ema=ema)
    return {name: read(name) for name in manifest.trained}
