"""The weights of a run's checkpoint over its base, read one tensor at a time."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from wan_accel.checkpoint import Manifest, read_manifest, read_trained, trained_by_expert
from wan_accel.lora_files import deltas, lora_layers
from wan_accel.models.derived_readers import DerivedReader, MergedReader
from wan_accel.models.errors import CheckpointError
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import BOTH


def trained_reader(checkpoint: Path, base: CheckpointReader, *, variant: str, expert: str) -> CheckpointReader:
    """The weights that a checkpoint stands for.

    A LoRA is added to the base's weights in fp32; tensors of full training replace the base's.

    Args:
        checkpoint: a complete checkpoint folder.
        base: what the run started from.
        variant: the recipe's variant.
        expert: the expert to read.

    Raises:
        ValueError: it trains another variant or expert, or does not fit the base.
    """
    manifest = read_manifest(checkpoint)
    if manifest.variant != variant or manifest.expert not in (expert, BOTH):
        raise ValueError(
            f"{checkpoint} trains the {manifest.expert} expert of {manifest.variant}, the recipe asks for the {expert} "
            f"expert of {variant}: use the recipe of that run, or set model.expert"
        )
    if manifest.method == "full":
        return TrainedReader(base, checkpoint, manifest, expert)
    trained = trained_by_expert(read_trained(checkpoint), manifest.expert)[expert]
    return merged_reader(base, trained, manifest, checkpoint)


def merged_reader(
    base: CheckpointReader, trained: dict[str, Tensor], manifest: Manifest, checkpoint: Path
) -> MergedReader:
    """A base with one expert's trained LoRA added to it, in fp32."""
    assert manifest.lora is not None
    layers, _ = lora_layers(trained, checkpoint, scale=manifest.lora["lora_alpha"] / manifest.lora["r"])
    return MergedReader(base, deltas(layers))


def _prefix(manifest: Manifest, expert: str) -> str:
    """What stands before the names of an expert's tensors: those of a pair come under its name."""
    return f"{expert}." if manifest.expert == BOTH else ""


class TrainedReader(DerivedReader):
    """A base checkpoint with a full run's tensors in place of its own.

    A process holds one tensor at a time, except for checkpoints of ZeRO-3: DeepSpeed reads those whole.

    Raises:
        CheckpointError: the run trained tensors that the base does not have, or of another shape.
    """

    def __init__(self, base: CheckpointReader, checkpoint: Path, manifest: Manifest, expert: str) -> None:
        super().__init__(base)
        self._prefix = _prefix(manifest, expert)
        self._checkpoint = checkpoint
        self._trained = {
            name.removeprefix(self._prefix): tuple(shape)
            for name, shape in manifest.trained.items()
            if name.startswith(self._prefix)
        }
        wrong = [name for name, shape in self._trained.items() if self.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(self._trained)} tensors of {checkpoint} do not fit {base.folder}, e.g. "
                f"{wrong[0]}: set model.checkpoint to what the run started from"
            )
        self._whole = read_trained(checkpoint) if manifest.engine == "zero3" else None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._trained:
            return super().read(name, rows)
        tensor = self._whole[self._prefix + name] if self._whole is not None else self._read_one(name)
        return tensor if rows is None else tensor[rows]

    def _read_one(self, name: str) -> Tensor:
        full_name = self._prefix + name
        state = {"model": {full_name: torch.empty(self._trained[name])}}
        dcp.load(state, checkpoint_id=str(self._checkpoint / "model"), no_dist=True)
        return state["model"][full_name]
