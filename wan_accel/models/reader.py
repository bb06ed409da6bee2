"""Read the tensors of a checkpoint one at a time and in part, under their original names, whatever its layout."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_accel.listing import first_few
from wan_accel.models.errors import CheckpointError
from wan_accel.models.layouts import Source, original_sources
from wan_accel.models.safetensors_file import SafetensorsFile


class TensorShapes(Protocol):
    """What tells which denoiser a checkpoint is of: the shapes of its tensors, by their original names."""

    @property
    def folder(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def num_heads(self) -> int | None: ...


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
        self._places: dict[str, SafetensorsFile] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._owner: dict[str, str] = {}
        self._stored_shapes: dict[str, tuple[int, ...]] = {}
        stored = self._stored_shapes
        for path in self._paths():
            handle = self._files[path.name] = open_safetensors(path)
            self._places[path.name] = SafetensorsFile(path)
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

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self.read(name, slice(0, 0)).dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor, or only some rows of its dim 0 (bytes outside them are not read)."""
        source = self._sources[name]
        if len(source.names) == 1 and source.shape == self._stored_shapes[source.names[0]]:
            return self._read_stored(source.names[0], rows)
        if len(source.names) == 1:  # the same bytes in another shape; such tensors are small
            whole = self._read_stored(source.names[0], None).reshape(source.shape)
            return whole if rows is None else whole[rows]
        return torch.cat([self._read_stored(part, taken) for part, taken in self._parts(source, rows)])

    def read_into(self, name: str, target: Tensor, rows: slice | None = None) -> None:
        """`read` into a tensor that is there, of any dtype and device and as many elements."""
        source = self._sources[name]
        stored = source.names[0]
        dtype = self._places[self._owner[stored]].dtype(stored)
        if len(source.names) > 1 or source.shape != self._stored_shapes[stored] or dtype is None:
            target.copy_(self.read(name, rows).reshape(target.shape))
        elif target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            self._read_stored_into(stored, rows, target)
        else:
            buffer = self._scratch_of(target, dtype)
            self._read_stored_into(stored, rows, buffer)
            target.copy_(buffer)

    def _scratch_of(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """A CPU tensor of a target's shape that the next call gives again; pinned for a GPU to copy from."""
        length = target.numel() * dtype.itemsize
        if len(self._scratch) < length:
            self._scratch = torch.empty(length, dtype=torch.uint8, pin_memory=target.device.type == "cuda")
        return self._scratch[:length].view(dtype).view(target.shape)

    def _read_stored_into(self, name: str, rows: slice | None, target: Tensor) -> None:
        self._places[self._owner[name]].read_into(name, rows, target)

    def _parts(self, source: Source, rows: slice | None) -> Iterator[tuple[str, slice]]:
        """The stored tensors that hold the asked rows, and which of theirs those are."""
        first, last, _ = (rows or slice(None)).indices(source.shape[0])
        start = 0
        for name in source.names:
            length = self._stored_shapes[name][0]
            yield name, slice(min(max(first - start, 0), length), min(max(last - start, 0), length))
            start += length

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
    return first_few(problems, 20, separator="\n  ")


def is_constant(name: str) -> bool:
    """Blur kernels are constants of the motion encoder; the original does not store them as parameters."""
    return name.endswith(".kernel")
