"""Write full weights as a checkpoint in the original layout, a shard in memory at a time."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan_accel.disk import free_bytes
from wan_accel.models.dit import dit_size_from_shapes
from wan_accel.models.errors import ReadBackError
from wan_accel.models.loading import build_denoiser
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import Variant
from wan_accel.original_files import shards_of, write_config, write_shards

MAX_SHARD_BYTES = 10 * 10**9


def tensor_bytes(reader: CheckpointReader, dtype: torch.dtype | None) -> dict[str, int]:
    """What each tensor takes in a dtype, by default in its own."""
    return {name: math.prod(shape) * (dtype or reader.dtype(name)).itemsize for name, shape in reader.shapes.items()}


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk holds an export, before anything of it is written.

    Raises:
        ValueError: it does not.
    """
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{folder}: the export needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: free some, or choose "
            "another --output"
        )


def write_full(
    folder: Path,
    reader: CheckpointReader,
    dtype: torch.dtype | None,
    *,
    variant: Variant,
    metadata: Mapping[str, str],
) -> int:
    """Write a DiT as safetensors shards with their index and config.json, and read them back.

    Args:
        folder: where the shards go; made if need be.
        reader: the tensors; each is read once to write and once to compare.
        dtype: to write; the reader's own by default.
        variant: of the model.
        metadata: of every file.

    Returns:
        The number of tensors.

    Raises:
        ReadBackError: a tensor does not read back as written, or diffsynth's model has no place for it.
    """

    with tqdm(total=2 * len(reader.shapes), desc=folder.name, unit=" tensors") as bar:  # written, then compared

        def read(name: str) -> Tensor:
            bar.update()
            return reader.read(name).to(dtype or reader.dtype(name))

        write_shards(folder, shards_of(tensor_bytes(reader, dtype), MAX_SHARD_BYTES), read, metadata)
        write_config(folder, variant, dit_size_from_shapes(reader.shapes, num_heads=reader.num_heads))
        _compare(folder, reader, read, variant)
    return len(reader.shapes)


def _compare(folder: Path, reader: CheckpointReader, read: Callable[[str], Tensor], variant: Variant) -> None:
    """Read what was written back: as diffsynth's own modules would have it, and equal."""
    written = CheckpointReader(folder)
    try:
        with torch.device("meta"):  # names and shapes only
            build_denoiser(variant, written, with_motion_encoder=variant.has_animate_adapter)
    except ValueError as error:
        raise ReadBackError(f"{folder} is not a whole {variant.name}: {error}") from error
    for name in reader.shapes:
        if not torch.equal(written.read(name), read(name)):
            raise ReadBackError(f"{folder}: {name} does not read back as written")
