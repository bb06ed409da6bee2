"""A DiT's folder in the original layout: safetensors shards, their index and config.json."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from wan_accel.models.variants import TEXT_LENGTH, DitSize, Variant

STEM = "diffusion_pytorch_model"
INDEX_NAME = f"{STEM}.safetensors.index.json"


def shards_of(num_bytes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    """Tensors in their order, in shards of at most `most_bytes`, or of one larger tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, needed in num_bytes.items():
        if shards[-1] and size + needed > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def write_shards(
    folder: Path, shards: Sequence[Sequence[str]], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write shards, one in memory at a time, and the index of several.

    Args:
        folder: where they go; made if need be.
        shards: the names in each.
        read: name -> tensor as it is to be written.
        metadata: of every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        place = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{STEM}{place}.safetensors"
        tensors = {name: read(name).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt", **metadata})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard is read
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_config(folder: Path, variant: Variant, size: DitSize) -> None:
    """The config.json of Wan's own code."""
    fields = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim")
    config = {
        "_class_name": "WanAnimateModel" if variant.has_animate_adapter else "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": variant.model_type,
        "text_len": TEXT_LENGTH,
        **{name: getattr(size, name) for name in fields},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
