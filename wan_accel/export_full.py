"""Write full weights as a checkpoint in the original layout, a shard in memory at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan_accel.models.dit import dit_size_from_shapes
from wan_accel.models.loading import MOTION_ENCODER, build_denoiser
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import TEXT_LENGTH, Variant

STEM = "diffusion_pytorch_model"
INDEX_NAME = f"{STEM}.safetensors.index.json"
MAX_SHARD_BYTES = 10 * 10**9


def full_names(trained: Mapping[str, Tensor], base: CheckpointReader) -> list[str]:
    """The tensors of a whole DiT: what was trained, and the base's motion encoder where it was not."""
    untouched = [name for name in base.shapes if name.startswith(MOTION_ENCODER) and name not in trained]
    return [*trained, *untouched]


def write_full(
    folder: Path,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    variant: Variant,
    base: CheckpointReader,
    metadata: Mapping[str, str],
) -> int:
    """Write tensors as safetensors shards with their index and config.json, and read them back.

    Args:
        folder: where the shards go; made if need be.
        names: original names.
        read: name -> tensor as it is to be written; called once to write and once to compare.
        variant: of the model.
        base: the checkpoint that was trained, for config.json.
        metadata: of every file.

    Returns:
        The number of tensors.

    Raises:
        RuntimeError: a tensor does not read back as written, or diffsynth's model has no place for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(names)
    _write_shards(folder, names, read, dict(metadata))
    (folder / "config.json").write_text(json.dumps(original_config(variant, base), indent=2) + "\n")
    written = CheckpointReader(folder)
    try:
        with torch.device("meta"):  # diffsynth's own modules, their names and shapes
            build_denoiser(variant, written, with_motion_encoder=variant.has_animate_adapter)
    except ValueError as error:
        raise RuntimeError(f"{folder} is not a whole {variant.name}: {error}") from error
    for name in names:
        if not torch.equal(written.read(name), read(name)):
            raise RuntimeError(f"{folder}: {name} does not read back as written")
    return len(names)


def _write_shards(folder: Path, names: list[str], read: Callable[[str], Tensor], metadata: dict[str, str]) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.tmp", metadata={"format": "pt", **metadata})
        shards.append(list(pending))
        pending.clear()

    for name in names:
        tensor = read(name).contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + num_bytes, total + num_bytes
    flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, which tell how many there are, and write the index of several."""
    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / f"{STEM}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{STEM}-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.tmp").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def original_config(variant: Variant, base: CheckpointReader) -> dict[str, object]:
    """The config.json of Wan's own code for a DiT of these shapes."""
    size = dit_size_from_shapes(base.shapes, num_heads=base.num_heads)
    fields = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim")
    return {
        "_class_name": "WanAnimateModel" if variant.has_animate_adapter else "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": variant.model_type,
        "text_len": TEXT_LENGTH,
        **{name: getattr(size, name) for name in fields},
    }
