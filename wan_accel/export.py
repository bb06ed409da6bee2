"""Leave a run: a LoRA or full weights in the layouts that other tools read, loaded back before it is called done."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wan_accel.checkpoint import Manifest, last_checkpoint, read_manifest, read_trained
from wan_accel.export_check import read_back
from wan_accel.export_full import full_names, write_full
from wan_accel.export_lora import LORA_LAYOUTS, folded, write_lora, write_peft
from wan_accel.lora_files import lora_deltas as lora_deltas
from wan_accel.lora_files import lora_layers
from wan_accel.model_card import CardFile, model_card
from wan_accel.models.reader import CheckpointReader, MergedReader
from wan_accel.models.variants import BOTH, Variant, get_variant
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Model, Recipe
from wan_accel.weights import open_base

logger = logging.getLogger(__name__)

LAYOUTS = {"lora": LORA_LAYOUTS, "full": ("original",)}
CARD = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One export: what is read, and how it is written.

    recipe: the run's, None where its recipe.yaml is gone.
    recipe_hash: first 16 digits of the sha256 of recipe.yaml.
    """

    checkpoint: Path
    manifest: Manifest
    recipe: Recipe | None
    recipe_hash: str
    layout: str
    dtype: torch.dtype | None
    merge: bool
    ema: bool

    @property
    def variant(self) -> Variant:
        return get_variant(self.manifest.variant)

    @property
    def is_full(self) -> bool:
        return self.layout == "original"

    def stem(self, expert: str) -> str:
        """`<variant>[_high_noise]-step<N>[-ema]-lora[-<layout>]`, or `-merged`; `both` names the pair."""
        pair = "" if expert in ("default", BOTH) else f"_{expert}_noise"
        kind = {(True, True): "-merged", (True, False): "", (False, False): "-lora"}[self.is_full, self.merge]
        layout = "" if self.layout in ("original", "diffsynth") else f"-{self.layout}"
        return f"{self.manifest.variant}{pair}-step{self.manifest.step}{'-ema' * self.ema}{kind}{layout}"


def export(
    path: Path,
    *,
    layout: str | None = None,
    output: Path | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    ema: bool = False,
    push_to_hub: str | None = None,
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

    Returns:
        What was written.

    Raises:
        ValueError: no complete checkpoint, a layout that does not fit the method, or an output that exists.
        RuntimeError: the written tensors, read back by the tool they are meant for, differ from ours.
    """
    checkpoint = path if (path / "manifest.json").is_file() else last_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path} holds no complete checkpoint: give a run's output_dir or a checkpoint-N folder")
    job = _plan(checkpoint, layout, dtype, merge, ema)
    output = output or default_output(job)
    as_file = output.suffix == ".safetensors"
    if as_file and (job.is_full or job.layout == "peft" or job.manifest.expert == BOTH):
        raise ValueError(f"{output}: this export is a folder, give --output a folder's name")
    for written in (output, output.with_suffix(".md")) if as_file else (output,):
        if written.exists():
            raise ValueError(f"{written} exists: remove it or choose another --output")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        read_by = _write(job, temporary, output.name if as_file else None)
        if push_to_hub is not None:
            logger.info("%s: uploaded to %s", output, push(temporary, push_to_hub))
    except BaseException:
        shutil.rmtree(temporary)  # nothing that looks like an export stays
        raise
    if as_file:
        (temporary / output.name).rename(output)
        (temporary / CARD).rename(output.with_suffix(".md"))
        temporary.rmdir()
    else:
        temporary.rename(output)
    logger.info("%s: read back by %s", output, read_by)
    return output


def _plan(checkpoint: Path, layout: str | None, dtype: torch.dtype | None, merge: bool, ema: bool) -> Export:
    manifest = read_manifest(checkpoint)
    if merge and manifest.method != "lora":
        raise ValueError(f"--merge adds a LoRA to its base, {checkpoint} holds full weights already: leave it out")
    layouts = LAYOUTS["full" if merge else manifest.method]
    if (layout or layouts[0]) not in layouts:
        hint = "; with --merge a LoRA becomes full weights" if layout == "original" else ""
        kind = "merged" if merge else manifest.method
        raise ValueError(f"layout {layout!r} does not fit a {kind} checkpoint: use {', '.join(layouts)}{hint}")
    place = next((folder for folder in (checkpoint, checkpoint.parent) if (folder / "recipe.yaml").is_file()), None)
    content = (place / "recipe.yaml").read_bytes() if place is not None else None
    return Export(
        checkpoint=checkpoint,
        manifest=manifest,
        recipe=None if place is None else load_recipe(str(place / "recipe.yaml")),
        recipe_hash="" if content is None else hashlib.sha256(content).hexdigest()[:16],
        layout=layout or layouts[0],
        dtype=dtype,
        merge=merge,
        ema=ema,
    )


def default_output(job: Export) -> Path:
    """`<run>/export/<name>`, a folder."""
    return job.checkpoint.parent / "export" / job.stem(job.manifest.expert)


def metadata(job: Export, expert: str) -> dict[str, str]:
    """What an exported file says of itself."""
    manifest = job.manifest
    fields = {
        "format": "pt",
        "variant": manifest.variant,
        "expert": expert,
        "base": manifest.base,
        "method": "lora merged into the base" if job.merge else manifest.method,
        "step": str(manifest.step),
        "ema": str(job.ema).lower(),
        "recipe": job.recipe_hash,
        "made_by": "wan-accel",
    }
    if manifest.lora is not None:
        fields |= {"rank": str(manifest.lora["r"]), "alpha": str(manifest.lora["lora_alpha"])}
    return fields


def trained_by_expert(trained: dict[str, Tensor], expert: str) -> dict[str, dict[str, Tensor]]:
    """Expert -> its tensors by their names in one denoiser; a pair's are stored under `high.` and `low.`."""
    if expert != BOTH:
        return {expert: trained}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in trained.items():
        prefix, _, rest = name.partition(".")
        found.setdefault(prefix, {})[rest] = tensor
    return found


def _write(job: Export, folder: Path, name: str | None) -> str:
    """Write every expert and the card into a folder; returns which tools loaded the export."""
    writer: Callable[[Export, Path, str, dict[str, Tensor], str | None], tuple[CardFile, str]]
    writer = _write_full if job.is_full else _write_lora
    trained = trained_by_expert(read_trained(job.checkpoint, ema=job.ema), job.manifest.expert)
    files, read_by = zip(*(writer(job, folder, expert, tensors, name) for expert, tensors in trained.items()))
    fused = [(lora.path, lora.scale) for lora in (job.recipe.model.fuse_loras if job.recipe else [])]
    card = model_card(
        title=job.stem(job.manifest.expert),
        variant=job.variant,
        layout=job.layout,
        files=list(files),
        metadata=metadata(job, job.manifest.expert),
        fused=[] if job.is_full else fused,
        read_by=read_by[0],
    )
    (folder / CARD).write_text(card)
    return read_by[0]


def _base(job: Export, expert: str) -> CheckpointReader:
    """The weights that an expert was trained on: the checkpoint with what the recipe put over and into it."""
    recipe = job.recipe
    model = replace(recipe.model, checkpoint=job.manifest.base) if recipe else Model(checkpoint=job.manifest.base)
    # A full run's own tensors replace the base's, all but the motion encoder, which init_from may have brought.
    is_over = job.manifest.method == "full" and job.variant.has_animate_adapter
    start = recipe.method.init_from if recipe is not None and is_over else None
    return open_base(model, job.variant, expert, start=None if start is None else Path(start))


def _write_lora(
    job: Export, folder: Path, expert: str, trained: dict[str, Tensor], name: str | None
) -> tuple[CardFile, str]:
    assert job.manifest.lora is not None
    rank, alpha = job.manifest.lora["r"], job.manifest.lora["lora_alpha"]
    layers, _ = lora_layers(trained, job.checkpoint, scale=alpha / rank)
    pairs, fields = folded(layers, job.dtype), metadata(job, expert)
    name = name or job.stem(expert) + ("" if job.layout == "peft" else ".safetensors")
    path = folder / name
    if job.layout == "peft":
        path = folder if job.manifest.expert != BOTH else path
        base = job.variant.hub_id
        write_peft(path, layers, rank=rank, alpha=alpha, base=base, dtype=job.dtype, metadata=fields)
    else:
        write_lora(path, job.layout, pairs, fields)
    read_by = read_back(path, job.layout, pairs, _base(job, expert), job.variant)
    logger.info("%s: %d layers, loaded by %s", path.name, len(pairs), read_by)
    return CardFile(name=name, expert=expert, modules=tuple(pairs)), read_by


def _write_full(
    job: Export, folder: Path, expert: str, trained: dict[str, Tensor], name: str | None
) -> tuple[CardFile, str]:
    base = _base(job, expert)
    if job.merge:
        assert job.manifest.lora is not None
        scale = job.manifest.lora["lora_alpha"] / job.manifest.lora["r"]
        layers, _ = lora_layers(trained, job.checkpoint, scale=scale)
        merged = MergedReader(base, {f"{key}.weight": pair for key, pair in folded(layers, None).items()})
        names = list(merged.shapes)

        def read(tensor: str) -> Tensor:
            return merged.read(tensor).to(job.dtype or base.read(tensor, slice(0, 0)).dtype)
    else:
        names = full_names(trained, base)

        def read(tensor: str) -> Tensor:
            value = trained[tensor] if tensor in trained else base.read(tensor)
            return value.to(job.dtype or value.dtype)

    place = job.variant.expert(expert).folder
    count = write_full(
        folder / place, names, read, variant=job.variant, base=base, metadata=metadata(job, expert)
    )
    logger.info("%s: %d tensors, read back equal", folder / place, count)
    return CardFile(name=place or "the folder", expert=expert), "diffsynth's modules, tensor by tensor"


def push(folder: Path, repo_id: str) -> str:
    """Upload an export to a model repository, which is made if need be; returns its address.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    from wan_accel.download import reaching_hub

    api = HfApi()
    with reaching_hub(f"{repo_id} at {api.endpoint} cannot be pushed to"):
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add an export of wan-accel")
    return f"{api.endpoint}/{repo_id}"


def describe(path: Path) -> str:
    """One line about an exported file or folder for the command line."""
    if path.is_file():
        return f"{path} ({path.stat().st_size / 2**20:.1f} MiB)"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = json.dumps(sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors")))
    return f"{path} ({size / 2**20:.1f} MiB, {files})"
