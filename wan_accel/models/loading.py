"""Build a Wan DiT and fill it from a checkpoint, whole or only with the slices that a rank holds."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffsynth.models.wan_video_animate_adapter import make_kernel
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from wan_accel.lora import base_name, initial_lora_value, is_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.dit import (
    animate_size_from_shapes,
    build_animate_adapter,
    build_dit,
    dit_size_from_shapes,
)
from wan_accel.models.errors import CheckpointError
from wan_accel.models.layouts import DIFFUSERS_FOLDERS, is_diffusers
from wan_accel.models.reader import (
    CheckpointReader,
    TensorShapes,
    compare_tensors,
    file_metadata,
    is_constant,
    listed,
    tensor_problems,
)
from wan_accel.models.variants import Variant, get_variant

# Only names that hold these parts belong to the motion encoder, which a denoiser may leave out.
MOTION_ENCODER = "motion_encoder."


def dit_folder(checkpoint: Path, variant: Variant, expert: str) -> Path:
    """The place of an expert's DiT inside a checkpoint of any layout; a safetensors file is its own.

    Raises:
        CheckpointError: it does not exist, or says that it is the other expert.
    """
    row = variant.expert(expert)
    if checkpoint.is_file():
        found = checkpoint
    elif not checkpoint.is_dir():
        raise CheckpointError(
            f"model.checkpoint={checkpoint} is not a folder: download {variant.hub_id} there, or make a tiny one with "
            f"`wan-accel init-tiny {variant.name} {checkpoint}`"
        )
    elif is_diffusers(checkpoint):
        found = checkpoint / DIFFUSERS_FOLDERS[expert]
    else:
        found = checkpoint / row.folder
    if not found.exists() and any(checkpoint.glob("*.safetensors")):
        found = checkpoint  # the folder of one expert alone
    if not found.exists():
        raise CheckpointError(f"{checkpoint} has no {found.name}/: this is not a {variant.name} checkpoint")
    check_expert(found, variant, expert)
    return found


def check_expert(path: Path, variant: Variant, expert: str) -> None:
    """Compare the expert that is wanted with the one that a file or folder names, in its metadata or its own name.

    Shapes cannot tell the experts of a pair apart.

    Raises:
        CheckpointError: it is the other one.
    """
    names = {row.name for row in variant.experts} - {"default"}
    said = file_metadata(path).get("expert", "")
    if said not in names:
        said = next((n for n in names if f"{n}_noise" in path.name or DIFFUSERS_FOLDERS[n] == path.name), "")
    if said in names and said != expert:
        raise CheckpointError(
            f"{path} holds the {said}-noise expert of {variant.name}, model.expert={expert} was asked for: give the "
            f"file of the {expert}-noise expert, or set model.expert={said}"
        )


def default_expert(variant: Variant) -> str:
    """The expert of a variant with only one.

    Raises:
        ValueError: there are several, so one must be named.
    """
    if len(variant.experts) > 1:
        names = " or ".join(expert.name for expert in variant.experts)
        raise ValueError(f"{variant.name} has two experts: set model.expert to {names}")
    return variant.experts[0].name


def build_denoiser(variant: Variant, reader: TensorShapes, *, with_motion_encoder: bool = False) -> WanDenoiser:
    """Build the denoiser that a checkpoint's shapes describe, on the current default device, unfilled.

    Raises:
        CheckpointError: the tensors are not those of the variant.
    """
    try:  # without a config.json: released sizes all have heads of 128
        dit = build_dit(dit_size_from_shapes(reader.shapes, num_heads=reader.num_heads))
        adapter = (
            build_animate_adapter(animate_size_from_shapes(reader.shapes)) if variant.has_animate_adapter else None
        )
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from None
    model = WanDenoiser(dit, adapter, with_motion_encoder=with_motion_encoder)
    _compare(model, reader)
    return model


def _compare(model: WanDenoiser, reader: TensorShapes) -> None:
    # Under zero.Init a parameter is empty and keeps its whole shape beside.
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    without_motion = not hasattr(model, "motion_encoder")
    found = {
        name: shape for name, shape in reader.shapes.items() if not (without_motion and name.startswith(MOTION_ENCODER))
    }
    compare_tensors(wanted, found, reader.folder)


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
    _compare_adapter(model, reader)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with gathered(parameter) if gathered is not None else nullcontext():
                if writes:
                    _fill(name, parameter, reader, seed)


def _compare_adapter(model: nn.Module, reader: CheckpointReader) -> None:
    """Compare the LoRA that a run starts from with the one that its recipe puts on the model."""
    if not reader.adapter:
        return
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if is_lora(name)}
    problems = tensor_problems(wanted, {name: tuple(tensor.shape) for name, tensor in reader.adapter.items()})
    if problems:
        raise CheckpointError(
            f"method.init_from: the LoRA does not fit method.target_modules ({len(problems)} tensors): name the layers "
            f"that it has\n  {listed(problems)}"
        )


def _fill(name: str, parameter: nn.Parameter, reader: CheckpointReader, seed: int) -> None:
    if isinstance(parameter, DTensor):
        rows, target = local_rows(parameter), parameter.to_local()
    else:
        rows, target = None, parameter.data
    stored = base_name(name)
    if is_lora(name):
        given = reader.adapter.get(name)
        value = initial_lora_value(name, tuple(parameter.shape), seed) if given is None else given
    elif stored not in reader.shapes and is_constant(name):
        value = make_kernel([1, 3, 3, 1])
    else:
        reader.read_into(stored, target, rows)
        return
    target.copy_((value if rows is None else value[rows]).reshape(target.shape))


def local_rows(parameter: DTensor) -> slice:
    """The rows of dim 0 that this rank holds (`fully_shard` shards dim 0 in ceil-sized chunks)."""
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate() or ()  # every rank is in the mesh of its own parameters
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise NotImplementedError(f"sharding of dim {placement.dim} is not supported")
            chunk = -(-parameter.shape[0] // mesh.size(axis))
            start = min(coordinate[axis] * chunk, parameter.shape[0])
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
        checkpoint: a folder in the original or diffusers layout, or one safetensors file.
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
