"""Readers over another reader: a LoRA added to what is read, whole parts replaced."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan_accel.models.errors import CheckpointError
from wan_accel.models.reader import CheckpointReader


class DerivedReader(CheckpointReader):
    """A reader over another one, for readers that change what is read."""

    def __init__(self, inner: CheckpointReader) -> None:
        self.inner = inner
        self.folder = inner.folder
        self.shapes = dict(inner.shapes)
        self.adapter = inner.adapter

    @property
    def num_heads(self) -> int | None:
        return self.inner.num_heads

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.inner.read(name, rows)

    def read_into(self, name: str, target: Tensor, rows: slice | None = None) -> None:
        target.copy_(self.read(name, rows).reshape(target.shape))


class MergedReader(DerivedReader):
    """A checkpoint with a LoRA added to its weights while they are read: W + scale * lora_B @ lora_A, in fp32.

    Args:
        source: the base checkpoint, or its reader.
        deltas: weight name -> (lora_A (r, in), lora_B (out, r)), see `wan_accel.lora_files`.
        scale: factor of the update.
        differences: tensor name -> what is added to it besides, times `scale`.

    Raises:
        CheckpointError: the LoRA is for another model: weights that the base does not have, or of another shape.
    """

    def __init__(
        self,
        source: Path | CheckpointReader,
        deltas: Mapping[str, tuple[Tensor, Tensor]],
        scale: float = 1.0,
        *,
        differences: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(source if isinstance(source, CheckpointReader) else CheckpointReader(source))
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= {name: (up.shape[0], down.shape[1]) for name, (down, up) in deltas.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in (differences or {}).items()}
        wrong = [name for name, shape in shapes.items() if self.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(shapes)} LoRA layers do not fit {self.folder}, e.g. {wrong[0]}: it is for "
                "another one"
            )
        self.deltas = deltas
        self.scale = scale
        self.differences = differences or {}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        weight = self.inner.read(name, rows)
        if name in self.deltas:
            down, up = (tensor.float() for tensor in self.deltas[name])
            weight = weight.float() + self.scale * ((up if rows is None else up[rows]) @ down)
        if name in self.differences:
            difference = self.differences[name].float()
            weight = weight.float() + self.scale * (difference if rows is None else difference[rows])
        return weight


class OverlaidReader(DerivedReader):
    """A checkpoint of which another file replaces whole parts: the DiT, the Animate adapter, or both.

    Args:
        inner: the checkpoint, which also says the number of heads.
        top: the file; a part that it touches it must hold completely.
        parts: the prefixes of tensor names that make up each part; what has none of them is the DiT's.

    Attributes:
        replaced: name -> shape of the checkpoint's tensors that are not read any more.
    """

    def __init__(self, inner: CheckpointReader, top: CheckpointReader, parts: Sequence[tuple[str, ...]]) -> None:
        super().__init__(inner)
        self.top = top

        def part(name: str) -> int:
            return next((index for index, prefixes in enumerate(parts) if name.startswith(prefixes)), -1)

        touched = {part(name) for name in top.shapes}
        self.folder = top.folder
        self.replaced = {name: shape for name, shape in inner.shapes.items() if part(name) in touched}
        self.shapes = {name: shape for name, shape in inner.shapes.items() if name not in self.replaced} | top.shapes

    def _holder(self, name: str) -> CheckpointReader:
        return self.top if name in self.top.shapes else self.inner

    def dtype(self, name: str) -> torch.dtype:
        return self._holder(name).dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._holder(name).read(name, rows)

    def read_into(self, name: str, target: Tensor, rows: slice | None = None) -> None:
        self._holder(name).read_into(name, target, rows)
