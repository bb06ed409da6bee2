"""Read a Wan DiT from safetensors files, whole or only the slices that a rank holds."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffsynth.models.wan_video_animate_adapter import make_kernel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from wan_accel.lora import base_name, initial_lora_value, is_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import (
    animate_size_from_shapes,
    build_animate_adapter,
    build_dit,
    dit_size_from_shapes,
)
from wan_accel.models.variants import Variant, get_variant

# Only names that hold these parts belong to the motion encoder, which a denoiser may leave out.
MOTION_ENCODER = "motion_encoder."
_DIFFUSERS_MARK = "condition_embedder."


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what, where, what to do."""


class CheckpointReader:
    """The tensors of a folder of safetensors files, read one at a time and in part.

    Raises:
        CheckpointError: no files, a file of the index is missing, or a file is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, str] = {}
        for path in self._paths():
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}): download it again") from None
            self._files[path.name] = handle
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._owner[name] = path.name

    def _paths(self) -> list[Path]:
        index = self.folder / "diffusion_pytorch_model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {', '.join(missing)} of {len(names)} files in {index.name}: download them"
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
        piece = self._files[self._owner[name]].get_slice(name)
        return piece[rows] if rows is not None else piece[...] if piece.get_shape() else piece[:]


def dit_folder(checkpoint: Path, variant: Variant, expert: str) -> Path:
    """The folder of an expert's DiT inside a checkpoint.

    Raises:
        CheckpointError: it does not exist.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"model.checkpoint={checkpoint} is not a folder: download {variant.hub_id} there, or make a tiny one with "
            f"`wan-accel init-tiny {variant.name} {checkpoint}`"
        )
    folder = checkpoint / variant.expert(expert).folder
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint} has no {variant.expert(expert).folder}/: this is not a {variant.name} checkpoint"
        )
    return folder


def default_expert(variant: Variant) -> str:
    """The expert of a variant with only one.

    Raises:
        ValueError: there are several, so one must be named.
    """
    if len(variant.experts) > 1:
        names = " or ".join(expert.name for expert in variant.experts)
        raise ValueError(f"{variant.name} has two experts: set model.expert to {names}")
    return variant.experts[0].name


def build_denoiser(variant: Variant, reader: CheckpointReader, *, with_motion_encoder: bool = False) -> WanDenoiser:
    """Build the denoiser that a checkpoint's shapes describe, on the current default device, unfilled.

    Raises:
        CheckpointError: the tensors are not those of the variant in the original layout.
    """
    if any(_DIFFUSERS_MARK in name for name in reader.shapes):
        raise CheckpointError(
            f"{reader.folder} is in the diffusers layout, which is not read yet: use {variant.hub_id}"
        )
    try:
        num_heads = json.loads((reader.folder / "config.json").read_text()).get("num_heads")
    except FileNotFoundError:
        num_heads = None  # released sizes all have heads of 128
    try:
        dit = build_dit(dit_size_from_shapes(reader.shapes, num_heads=num_heads))
        adapter = (
            build_animate_adapter(animate_size_from_shapes(reader.shapes)) if variant.has_animate_adapter else None
        )
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from None
    model = WanDenoiser(dit, adapter, with_motion_encoder=with_motion_encoder)
    _compare(model, reader)
    return model


def _compare(model: WanDenoiser, reader: CheckpointReader) -> None:
    # Under zero.Init a parameter is empty and keeps its whole shape beside.
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    without_motion = not hasattr(model, "motion_encoder")
    found = {
        name: shape for name, shape in reader.shapes.items() if not (without_motion and name.startswith(MOTION_ENCODER))
    }
    compare_tensors(wanted, found, reader.folder)


def compare_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compare the tensors that a model has with those of a checkpoint; constants may be missing.

    Raises:
        CheckpointError: every missing, unknown and mis-shaped tensor at once.
    """
    problems = [
        f"missing {name} {shape}" for name, shape in wanted.items() if name not in found and not _is_constant(name)
    ]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        listed = "\n  ".join(problems[:20])
        raise CheckpointError(
            f"{source} does not fit the model ({len(problems)} tensors): use the file of the released checkpoint\n"
            f"  {listed}{more}"
        )


def _is_constant(name: str) -> bool:
    """Blur kernels are constants of the motion encoder; the original does not store them as parameters."""
    return name.endswith(".kernel")


def fill_parameters(
    model: nn.Module,
    reader: CheckpointReader,
    *,
    seed: int,
    gathered: Callable[[nn.Parameter], AbstractContextManager] | None = None,
    writes: bool = True,
) -> None:
    """Fill a materialised model from a checkpoint; LoRA tensors get their initial values.

    DTensors are filled from the rows that this rank holds and nothing else is read.

    Args:
        model: plain, FSDP2-sharded (after `to_empty`) or ZeRO-3-partitioned parameters.
        reader: the checkpoint.
        seed: of the LoRA's initial values.
        gathered: for ZeRO-3: the context in which a parameter is whole (`GatheredParameters`).
        writes: False on ranks that only take part in gathering.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad(), gathered(parameter) if gathered is not None else nullcontext():
            if writes:
                _fill(name, parameter, reader, seed)


def _fill(name: str, parameter: nn.Parameter, reader: CheckpointReader, seed: int) -> None:
    target = parameter.data
    rows = None
    if isinstance(target, DTensor):
        rows = _local_rows(target)
        target = target.to_local()
    if is_lora(name):
        value = initial_lora_value(name, tuple(parameter.shape), seed)
        value = value if rows is None else value[rows]
    elif base_name(name) not in reader.shapes and _is_constant(name):
        value = make_kernel([1, 3, 3, 1])
        value = value if rows is None else value[rows]
    else:
        value = reader.read(base_name(name), rows)
    target.copy_(value.reshape(target.shape))


def _local_rows(parameter: DTensor) -> slice:
    """The rows of dim 0 that this rank holds (`fully_shard` shards dim 0 in ceil-sized chunks)."""
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise NotImplementedError(f"sharding of dim {placement.dim} is not supported")
            chunk = -(-parameter.shape[0] // mesh.size(axis))
            start = min(mesh.get_local_rank(axis) * chunk, parameter.shape[0])
            return slice(start, min(start + chunk, parameter.shape[0]))
    return slice(0, parameter.shape[0])


def load_wan(
    variant: str,
    checkpoint: str | Path,
    *,
    expert: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    with_motion_encoder: bool = False,
) -> WanDenoiser:
    """Load a denoiser whole, for one process.

    Args:
        variant: a name of the variants table, e.g. `animate-14b`.
        checkpoint: a folder in the original layout.
        expert: `high` or `low` for A14B pairs.
        torch_dtype: of the parameters.
        device: where they live.
        with_motion_encoder: keep Animate's motion encoder; see `WanDenoiser`.

    Raises:
        CheckpointError: the checkpoint does not fit, with every problem listed.
        ValueError: the variant or expert is not known.
    """
    row = get_variant(variant)
    reader = CheckpointReader(dit_folder(Path(checkpoint), row, expert or default_expert(row)))
    with torch.device("meta"):
        model = build_denoiser(row, reader, with_motion_encoder=with_motion_encoder).to(torch_dtype)
    model.to_empty(device=device)
    fill_parameters(model, reader, seed=0)
    return model


class MergedReader(CheckpointReader):
    """A checkpoint with a LoRA added to its weights while they are read: W + scale * lora_B @ lora_A, in fp32.

    Args:
        folder: the base checkpoint.
        deltas: weight name -> (lora_A (r, in), lora_B (out, r)), see `wan_accel.export.lora_deltas`.
        scale: factor of the update.

    Raises:
        CheckpointError: the LoRA is for another model: weights that the base does not have, or of another shape.
    """

    def __init__(self, folder: Path, deltas: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
        super().__init__(folder)
        wrong = [name for name, (down, up) in deltas.items() if self.shapes.get(name) != (up.shape[0], down.shape[1])]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(deltas)} LoRA layers do not fit {folder}, e.g. {wrong[0]}: it is for another one"
            )
        self.deltas = deltas
        self.scale = scale

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        weight = super().read(name, rows)
        if name not in self.deltas:
            return weight
        down, up = (tensor.float() for tensor in self.deltas[name])
        up = up if rows is None else up[rows]
        return weight.float() + self.scale * (up @ down)
