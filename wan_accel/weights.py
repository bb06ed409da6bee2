"""The weights that a run starts from: the checkpoint, a file over it, LoRAs fused into it, an adapter to go on from."""

import logging
from pathlib import Path

from wan_accel.lora import LoraSettings
from wan_accel.lora_files import LoraFile, find_lora, read_lora
from wan_accel.lora_start import starting_adapter
from wan_accel.models.derived_readers import MergedReader, OverlaidReader
from wan_accel.models.dit import ADAPTER_PREFIXES
from wan_accel.models.errors import CheckpointError
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.loading import MOTION_ENCODER, check_expert, dit_folder
from wan_accel.models.reader import CheckpointReader, compare_tensors, is_constant
from wan_accel.models.variants import Variant, get_variant
from wan_accel.recipe.schema import FusedLora, Model, Recipe

logger = logging.getLogger(__name__)

# Parts of a DiT's tensors that a file replaces whole: DiffSynth trains the Animate adapter apart from the DiT.
_PARTS = ((MOTION_ENCODER,), tuple(prefix for prefix in ADAPTER_PREFIXES if prefix != MOTION_ENCODER))


def open_weights(recipe: Recipe, expert: str, lora: LoraSettings | None) -> CheckpointReader:
    """Open what a recipe starts an expert from; only headers and LoRA files are read.

    Args:
        recipe: a checked recipe.
        expert: of the variant, `default` where there is one.
        lora: the adapters that will be trained, None for full training.

    Raises:
        CheckpointError: something is missing or does not fit; what and what to do.
    """
    variant, init_from = get_variant(recipe.variant), recipe.method.init_from
    start = Path(init_from) if init_from is not None and lora is None else None
    reader = open_base(recipe.model, variant, expert, start=start)
    if init_from is not None and lora is not None:
        found = _read_lora(Path(init_from), variant, expert)
        reader.adapter = starting_adapter(found, lora)
        logger.info("the LoRA starts from %s (%d layers)", found.path, len(found.layers))
    return reader


def open_base(model: Model, variant: Variant, expert: str, *, start: Path | None = None) -> CheckpointReader:
    """The frozen weights of a recipe: its checkpoint, a DiT that replaces it, its fused LoRAs."""
    checkpoint = resolve_checkpoint(model.checkpoint, model.revision)
    reader = CheckpointReader(dit_folder(checkpoint, variant, expert))
    if start is not None:
        reader = overlay(reader, start, variant, expert)
    for fused in model.fuse_loras:
        reader = fuse(reader, fused, variant, expert)
    return reader


def overlay(reader: CheckpointReader, path: Path, variant: Variant, expert: str) -> CheckpointReader:
    """The DiT of another file or folder over a checkpoint; parts that it does not touch stay the checkpoint's."""
    if not path.exists():
        raise CheckpointError(f"method.init_from={path} does not exist: give a safetensors file or a checkpoint folder")
    top = CheckpointReader(dit_folder(path, variant, expert))
    if any(".lora_" in name for name in top.shapes):
        raise CheckpointError(
            f"method.init_from={path} is a LoRA: full training starts from full weights; add it to the base with "
            "model.fuse_loras, or set method.kind=lora"
        )
    overlaid = OverlaidReader(reader, top, _PARTS)
    stored = {name: shape for name, shape in top.shapes.items() if not is_constant(name)}
    compare_tensors(overlaid.replaced, stored, path)
    kept = sorted({name.split(".")[0] for name in overlaid.shapes if name not in top.shapes})
    logger.info("training starts from %s%s", path, f", with {', '.join(kept)} of {reader.folder}" if kept else "")
    return overlaid


def fuse(reader: CheckpointReader, fused: FusedLora, variant: Variant, expert: str) -> CheckpointReader:
    """A LoRA of any layout added to what `reader` reads."""
    lora = _read_lora(Path(fused.path), variant, expert)
    logger.info("%s: %d layers are added to the base, times %g", lora.path, len(lora.layers), fused.scale)
    return MergedReader(reader, lora.deltas(), fused.scale, differences=lora.differences)


def _read_lora(path: Path, variant: Variant, expert: str) -> LoraFile:
    """The LoRA that a path means for an expert; one of another variant may fit, so that it is only said."""
    path = find_lora(path, expert)
    lora = read_lora(path, expert)
    check_expert(path, variant, expert)
    if (said := lora.metadata.get("variant", variant.name)) != variant.name:
        logger.warning("%s was trained on %s and is put on %s: see that this is meant", path, said, variant.name)
    return lora
