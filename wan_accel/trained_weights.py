"""The weights of a run's checkpoint over its base, read one tensor at a time."""

from pathlib import Path

import torch
from torch import Tensor

from wan_accel.checkpoint import Manifest, open_trained, read_manifest
from wan_accel.lora_files import LoraLayer, deltas, lora_layers
from wan_accel.models.derived_readers import DerivedReader, MergedReader
from wan_accel.models.errors import CheckpointError
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import BOTH


def trained_reader(
    checkpoint: Path, base: CheckpointReader, *, variant: str, expert: str, ema: bool = False
) -> CheckpointReader:
    """The weights that a checkpoint stands for.

    A LoRA is added to the base's weights in fp32; tensors of full training replace the base's.

    Args:
        checkpoint: a complete checkpoint folder.
        base: what the run started from.
        variant: the recipe's variant.
        expert: the expert to read.
        ema: take the moving averages of what was trained.

    Raises:
        ValueError: it trains another variant or expert, has no moving average, or does not fit the base.
    """
    manifest = read_manifest(checkpoint)
    if manifest.variant != variant or manifest.expert not in (expert, BOTH):
        raise ValueError(
            f"{checkpoint} trains the {manifest.expert} expert of {manifest.variant}, the recipe asks for the {expert} "
            f"expert of {variant}: use the recipe of that run, or set model.expert"
        )
    if manifest.method == "full":
        return TrainedReader(base, checkpoint, manifest, expert, ema=ema)
    return MergedReader(base, deltas(trained_lora(checkpoint, manifest, expert, ema=ema)))


def trained_lora(checkpoint: Path, manifest: Manifest, expert: str, *, ema: bool = False) -> dict[str, LoraLayer]:
    """An expert's LoRA in a checkpoint, by original module names."""
    assert manifest.lora is not None
    read = open_trained(checkpoint, manifest, ema=ema)
    prefix = _prefix(manifest, expert)
    trained = {name: read(prefix + name) for name in _shapes(manifest, prefix)}
    return lora_layers(trained, checkpoint, scale=manifest.lora["lora_alpha"] / manifest.lora["r"])[0]


def _prefix(manifest: Manifest, expert: str) -> str:
    """What stands before the names of an expert's tensors: those of a pair come under its name."""
    return f"{expert}." if manifest.expert == BOTH else ""


def _shapes(manifest: Manifest, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors under a prefix, by their names in one denoiser."""
    return {
        name.removeprefix(prefix): tuple(shape) for name, shape in manifest.trained.items() if name.startswith(prefix)
    }


class TrainedReader(DerivedReader):
    """A base checkpoint with a full run's tensors, or their moving averages, in place of its own.

    A process holds one tensor at a time, whatever the engine.

    Raises:
        CheckpointError: the run trained tensors that the base does not have, or of another shape.
    """

    def __init__(
        self, base: CheckpointReader, checkpoint: Path, manifest: Manifest, expert: str, *, ema: bool = False
    ) -> None:
        super().__init__(base)
        self._prefix = _prefix(manifest, expert)
        self._trained = _shapes(manifest, self._prefix)
        wrong = [name for name, shape in self._trained.items() if self.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(self._trained)} tensors of {checkpoint} do not fit {base.folder}, e.g. "
                f"{wrong[0]}: set model.checkpoint to what the run started from"
            )
        self._read_trained = open_trained(checkpoint, manifest, ema=ema)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._trained else super().dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._trained:
            return super().read(name, rows)
        tensor = self._read_trained(self._prefix + name)
        return tensor if rows is None else tensor[rows]
