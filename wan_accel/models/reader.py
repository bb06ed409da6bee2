"""Read the tensors of a checkpoint one at a time and in part, under their original names, whatever its layout."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_accel.models.errors import CheckpointError
from wan_accel.models.layouts import Source, original_sources

_SHOWN = 20


class CheckpointReader:
    """The tensors of a folder of safetensors files, or of one such file, in any layout that `layouts` knows.

    Attributes:
        folder: the folder or file.
        shapes: original name -> shape of every tensor.
        adapter: starting values of LoRA tensors by their names in the model; empty for a fresh LoRA.

    Raises:
        CheckpointError: no files, a file of the index is missing, a file is cut short, or a tensor is there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapter: Mapping[str, Tensor] = {}
        self._files = {}
        self._owner: dict[str, str] = {}
        stored: dict[str, tuple[int, ...]] = {}
        for path in self._paths():
            handle = self._files[path.name] = open_safetensors(path)
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                if name in stored:
                    raise CheckpointError(
                        f"{folder}: {name} is in {self._owner[name]} and in {path.name}: keep one set of files"
                    )
                stored[name] = tuple(handle.get_slice(name).get_shape())
                self._owner[name] = path.name
        try:
            self._sources: Mapping[str, Source] = original_sources(stored)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        self.shapes: dict[str, tuple[int, ...]] = {name: source.shape for name, source in self._sources.items()}

    @property
    def num_heads(self) -> int | None:
        """Attention heads as config.json says, which no tensor shows; None where there is no such file."""
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        try:
            config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            return None
        return config.get("num_heads", config.get("num_attention_heads"))

    def _paths(self) -> list[Path]:
        if self.folder.is_file():
            return [self.folder]
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            several = ", ".join(index.name for index in indices)
            raise CheckpointError(f"{self.folder} holds several sets of weights ({several}): keep one of them")
        if indices:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {', '.join(missing)} of {len(names)} files in {indices[0].name}: "
                    "download them"
                )
            return [self.folder / name for name in names]
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{self.folder} holds no .safetensors files: set model.checkpoint to the folder of a Wan checkpoint"
            )
        return paths

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor, or only some rows of its dim 0 (bytes outside them are not read)."""
        source = self._sources[name]
        if len(source.names) == 1 and source.shape == self._stored_shape(source.names[0]):
            return self._read_stored(source.names[0], rows)
        if len(source.names) == 1:  # the same bytes in another shape; such tensors are small
            whole = self._read_stored(source.names[0], None).reshape(source.shape)
            return whole if rows is None else whole[rows]
        return torch.cat([self._read_stored(part, taken) for part, taken in self._parts(source, rows)])

    def _parts(self, source: Source, rows: slice | None) -> Iterator[tuple[str, slice]]:
        """The stored tensors that hold the asked rows, and which of theirs those are."""
        first, last, _ = (rows or slice(None)).indices(source.shape[0])
        start = 0
        for name in source.names:
            length = self._stored_shape(name)[0]
            yield name, slice(min(max(first - start, 0), length), min(max(last - start, 0), length))
            start += length

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._owner[name]].get_slice(name).get_shape())

    def _read_stored(self, name: str, rows: slice | None) -> Tensor:
        piece = self._files[self._owner[name]].get_slice(name)
        return piece[rows] if rows is not None else piece[...] if piece.get_shape() else piece[:]


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file, reading only its header.

    Raises:
        CheckpointError: it is damaged or cut short.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}): download it again") from None


def file_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file, or the first of a folder of them, says of itself; {} if it says nothing."""
    paths = [path] if path.is_file() else sorted(path.glob("*.safetensors"))[:1]
    return dict(open_safetensors(paths[0]).metadata() or {}) if paths else {}


def compare_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compare the tensors that a model has with those of a checkpoint; constants may be missing.

    Raises:
        CheckpointError: every missing, unknown and mis-shaped tensor at once.
    """
    problems = tensor_problems(wanted, found)
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model ({len(problems)} tensors): use the file of the released checkpoint\n"
            f"  {listed(problems)}"
        )


def tensor_problems(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every missing, unknown and mis-shaped tensor, one line each."""
    problems = [
        f"missing {name} {shape}" for name, shape in wanted.items() if name not in found and not is_constant(name)
    ]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return problems


def listed(problems: Sequence[str]) -> str:
    """Lines for a message, the first twenty of many."""
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "\n  ".join(problems[:_SHOWN]) + more


def is_constant(name: str) -> bool:
    """Blur kernels are constants of the motion encoder; the original does not store them as parameters."""
    return name.endswith(".kernel")


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

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.inner.read(name, rows)


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
        top: the file; a part that it touches it must hold completely, which the comparison with a model shows.
        parts: the prefixes of tensor names that make up each part; what has none of them is the DiT's.
    """

    def __init__(self, inner: CheckpointReader, top: CheckpointReader, parts: Sequence[tuple[str, ...]]) -> None:
        super().__init__(inner)
        self.top = top

        def part(name: str) -> int:
            return next((index for index, prefixes in enumerate(parts) if name.startswith(prefixes)), -1)

        replaced = {part(name) for name in top.shapes}
        self.replaced_parts = replaced
        self.folder = top.folder
        self.shapes = {name: shape for name, shape in inner.shapes.items() if part(name) not in replaced}
        self.shapes |= top.shapes

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return (self.top if name in self.top.shapes else self.inner).read(name, rows)
