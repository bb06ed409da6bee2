"""Leave a run: a LoRA or full weights in the layouts that other tools read, loaded back before it is called done."""

import json
import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from wan_accel.checkpoint import find_checkpoint
from wan_accel.export_check import read_back
from wan_accel.export_full import check_space, tensor_bytes, write_full
from wan_accel.export_lora import folded, write_lora, write_peft
from wan_accel.export_plan import Export, default_output, metadata, plan_export, shown_name
from wan_accel.hub import HubError
from wan_accel.model_card import CardFile, model_card
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import BOTH
from wan_accel.push import CARD, card_of, check_repo_id, push
from wan_accel.recipe.schema import Model
from wan_accel.trained_weights import trained_lora, trained_reader
from wan_accel.weights import open_base

logger = logging.getLogger(__name__)

FILE = ".safetensors"


def export(
    path: Path,
    *,
    layout: str | None = None,
    output: Path | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    ema: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Export a checkpoint, or the newest one of a run.

    Args:
        path: a run's output_dir or one of its checkpoint folders.
        layout: `diffsynth`, `comfyui`, `diffusers` or `peft` for a LoRA; `original` for full weights.
        output: folder to write, `<run>/export/...` by default. A LoRA of one expert can be a `.safetensors` file, its
            card then being `.md` beside. An existing one is not overwritten.
        dtype: of the written tensors; as trained by default, as the base's where a LoRA is merged.
        merge: write the base with the LoRA in it, as full weights.
        ema: export the moving averages of the weights.
        push_to_hub: `owner/name` of a model repository that the export is uploaded to as well.
        private: make that repository readable by its owner only.

    Returns:
        What was written.

    Raises:
        ValueError: no complete checkpoint, a layout that does not fit the method, an output that exists, a full disk.
        HubError: the export is written and not uploaded; `wan_accel.push.push` tries again.
        ReadBackError: the written tensors, read back by the tool they are meant for, differ from ours.
    """
    if push_to_hub is not None:
        check_repo_id(push_to_hub)
    elif private:
        raise ValueError("--private is of the repository that --push-to-hub names: give both or neither")
    path = path.resolve()  # "." has no parent, where the run's recipe and exports are
    job = plan_export(find_checkpoint(path), layout, dtype, merge, ema)
    output = output or default_output(job)
    _check_output(job, output)
    read_by = _write_in_place(job, output)
    logger.info("%s: read back by %s", output, read_by)
    if push_to_hub is not None:
        _push(output, push_to_hub, private=private)
    return output


def _push(output: Path, repo_id: str, *, private: bool) -> None:
    try:
        address = push(output, repo_id, private=private)
    except HubError as error:
        again = shlex.join(["wan-accel", "push", str(output), repo_id, *["--private"] * private])
        raise type(error)(f"{output} is written, but {error}. To try again: {again}") from error
    logger.info("%s: uploaded to %s", output, address)


def _check_output(job: Export, output: Path) -> None:
    is_file = output.suffix == FILE
    if is_file and (job.is_full or job.layout == "peft" or job.manifest.expert == BOTH):
        raise ValueError(f"{output}: this export is a folder, give --output a folder's name")
    for written in (output, card_of(output)) if is_file else (output,):
        if written.exists():
            raise ValueError(f"{written} exists: remove it or choose another --output (`wan-accel push` uploads it)")
    if _temporary(output).exists():
        raise ValueError(
            f"{_temporary(output)} exists, which an export leaves that was killed or is still running: see that none "
            "is and remove it, or choose another --output"
        )


def _temporary(output: Path) -> Path:
    """The folder beside that an export is written to until it is whole."""
    return output.with_name(f"{output.name}.tmp")


def _write_in_place(job: Export, output: Path) -> str:
    """Write into a folder beside and rename it, or take the file and the card out of it, when all is read back."""
    temporary = _temporary(output)
    temporary.mkdir(parents=True)
    try:
        read_by = _write(job, temporary, output.name if output.suffix == FILE else None)
    except BaseException:
        shutil.rmtree(temporary)  # nothing that looks like an export stays
        raise
    if output.suffix == FILE:
        (temporary / output.name).rename(output)
        (temporary / CARD).rename(card_of(output))
        temporary.rmdir()
    else:
        temporary.rename(output)
    return read_by


def _write(job: Export, folder: Path, name: str | None) -> str:
    """Write every expert and the card into a folder; returns which tools loaded the export."""
    files, read_by = _write_full(job, folder) if job.is_full else _write_lora(job, folder, name)
    fused = [(shown_name(lora.path), lora.scale) for lora in (job.recipe.model.fuse_loras if job.recipe else [])]
    card = model_card(
        title=job.stem(job.manifest.expert),
        variant=job.variant,
        layout=job.layout,
        files=files,
        metadata=metadata(job, job.manifest.expert),
        fused=[] if job.is_full else fused,
        read_by=read_by,
    )
    (folder / CARD).write_text(card)
    return read_by


def _base(job: Export, expert: str) -> CheckpointReader:
    """The weights that an expert was trained on: the checkpoint with what the recipe put over and into it."""
    recipe = job.recipe
    model = replace(recipe.model, checkpoint=job.manifest.base) if recipe else Model(checkpoint=job.manifest.base)
    # A full run's own tensors replace the base's, all but the motion encoder, which init_from may have brought.
    is_over = job.manifest.method == "full" and job.variant.has_animate_adapter
    start = recipe.method.init_from if recipe is not None and is_over else None
    return open_base(model, job.variant, expert, start=None if start is None else Path(start))


def _write_lora(job: Export, folder: Path, name: str | None) -> tuple[list[CardFile], str]:
    """Write each expert's LoRA, into a file of this name where there is one; returns the files and who read them."""
    files, read_by = zip(*(_write_lora_of(job, folder, expert, name) for expert in job.experts))
    return list(files), read_by[0]


def _write_lora_of(job: Export, folder: Path, expert: str, name: str | None) -> tuple[CardFile, str]:
    assert job.manifest.lora is not None
    layers = trained_lora(job.checkpoint, job.manifest, expert, ema=job.ema)
    pairs, fields = folded(layers, job.dtype), metadata(job, expert)
    name = name or job.stem(expert) + ("" if job.layout == "peft" else FILE)
    path = folder / name
    if job.layout == "peft":
        if job.manifest.expert != BOTH:
            path, name = folder, "<folder>"
        rank, alpha, base = job.manifest.lora["r"], job.manifest.lora["lora_alpha"], job.variant.hub_id
        write_peft(path, layers, rank=rank, alpha=alpha, base=base, dtype=job.dtype, metadata=fields)
    else:
        write_lora(path, job.layout, pairs, fields)
    read_by = read_back(path, job.layout, pairs, _base(job, expert), job.variant)
    logger.info("%s: %d layers, loaded by %s", path.name, len(pairs), read_by)
    return CardFile(name=name, expert=expert, modules=tuple(pairs)), read_by


def _write_full(job: Export, folder: Path) -> tuple[list[CardFile], str]:
    """Write each expert's whole weights; returns their folders and who read them."""
    readers = {
        expert: trained_reader(
            job.checkpoint, _base(job, expert), variant=job.manifest.variant, expert=expert, ema=job.ema
        )
        for expert in job.experts
    }
    check_space(folder.parent, sum(sum(tensor_bytes(reader, job.dtype).values()) for reader in readers.values()))
    files = []
    for expert, reader in readers.items():
        place = job.variant.expert(expert).folder
        count = write_full(
            folder / place, reader, job.dtype, variant=job.variant, metadata=metadata(job, expert)
        )
        logger.info("%s: %d tensors, read back equal", folder / place, count)
        files.append(CardFile(name=place, expert=expert))
    return files, "diffsynth's modules, tensor by tensor"


def describe(path: Path) -> str:
    """One line about an exported file or folder for the command line."""
    if path.is_file():
        return f"{path} ({path.stat().st_size / 2**20:.1f} MiB)"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = json.dumps(sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors")))
    return f"{path} ({size / 2**20:.1f} MiB, {files})"
