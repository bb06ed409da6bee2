"""Put a denoiser together for training: the techniques, in their order, then the weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models.attention import check_attention
from wan_accel.models.blocks import CheckpointedModule
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.compile_rules import compile_problems
from wan_accel.models.denoiser import WanDenoiser, inject_ulysses, set_attention
from wan_accel.models.fp8 import check_fp8, convert_to_fp8
from wan_accel.models.loading import CheckpointReader, build_denoiser, fill_parameters
from wan_accel.models.pair import ExpertPair
from wan_accel.models.reader import TensorShapes
from wan_accel.models.recompute import Policy, recompute_of
from wan_accel.models.variants import Variant
from wan_accel.parallel.engine import launched_offload
from wan_accel.parallel.fsdp import fully_shard_denoiser, offloads
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.names import Engine
from wan_accel.parallel.plugins import fsdp2_plugin
from wan_accel.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Techniques:
    """What is done to the model before training.

    torch_dtype: of the parameters that are read from the checkpoint. Trained ones stay fp32.
    attention: a row of `ATTENTION_BACKENDS`.
    fp8: matrix products of the blocks' base linears in 8 bits.
    activation_checkpointing: a policy of `wan_accel.models.recompute`, or a budget in (0, 1).
    compile: compile the blocks, for up to `num_shapes` shapes of micro-batches.
    """

    lora: LoraSettings | None = None
    torch_dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    fp8: bool = False
    activation_checkpointing: Policy | float = "none"
    compile: bool = False
    num_shapes: int = 1
    seed: int = 0


def techniques_of(recipe: Recipe, seed: int) -> Techniques:
    """The model techniques of a recipe."""
    lora = None
    if recipe.method.kind == "lora":
        targets = recipe.method.target_modules
        lora = LoraSettings(
            r=recipe.method.r,
            lora_alpha=recipe.method.lora_alpha,
            target_modules=() if targets == "default" else tuple(targets),
        )
    return Techniques(
        lora=lora,
        torch_dtype=getattr(torch, recipe.model.torch_dtype),
        attention=recipe.model.attention,
        fp8=recipe.memory.fp8,
        activation_checkpointing=recipe.memory.activation_checkpointing,
        compile=recipe.memory.compile,
        seed=seed,
    )


def assemble(
    variant: Variant,
    reader: CheckpointReader,
    techniques: Techniques,
    *,
    engine: Engine,
    dims: ParallelDims,
    device: torch.device,
) -> WanDenoiser:
    """Build, adapt, shard and fill a denoiser. Collective.

    Under FSDP2 nothing but this rank's slices is ever in memory, with offloading in host memory. Under ZeRO-3
    parameters are partitioned while they are created and filled one gathered parameter at a time; ZeRO-2, DDP and
    single processes hold the whole model.

    Raises:
        CheckpointError, ValueError: the checkpoint, targets or degrees do not fit, or techniques exclude each other.
    """
    problems = compile_problems(techniques, engine)
    if problems:
        raise ValueError("\n".join(problems))
    if engine == "zero3":
        return _assemble_zero3(variant, reader, techniques, dims, device)
    model = build_skeleton(variant, reader, techniques, dims, device)
    place = device
    if engine == "fsdp2":
        plugin = fsdp2_plugin(variant.name)
        fully_shard_denoiser(model, plugin, dims.shard_mesh(device.type))
        place = torch.device("cpu") if offloads(plugin) else device
    elif engine == "zero2" and _bf16_over_masters(techniques.torch_dtype):
        model.to(torch.bfloat16)  # as DeepSpeed would, with fp32 copies in memory until then
    model.to_empty(device=place)
    fill_parameters(model, reader, seed=techniques.seed)
    return model


def build_skeleton(
    variant: Variant, shapes: TensorShapes, techniques: Techniques, dims: ParallelDims, device: torch.device
) -> WanDenoiser:
    """A denoiser on the meta device with every technique applied, for `device`: to be sharded and filled.

    Collective with sequence parallelism.
    """
    with torch.device("meta"):
        model = build_denoiser(variant, shapes).to(techniques.torch_dtype)
    _apply(model, variant, techniques, dims, device)
    return model


def assemble_experts(
    variant: Variant,
    readers: Mapping[str, CheckpointReader],
    techniques: Techniques,
    *,
    engine: Engine,
    dims: ParallelDims,
    device: torch.device,
) -> WanDenoiser | ExpertPair:
    """Assemble the experts that `readers` name, one by one: a denoiser, or a pair. Collective; see `assemble`."""
    experts = {
        name: assemble(variant, reader, techniques, engine=engine, dims=dims, device=device)
        for name, reader in readers.items()
    }
    return ExpertPair(experts) if len(experts) > 1 else next(iter(experts.values()))


def _apply(
    model: WanDenoiser, variant: Variant, techniques: Techniques, dims: ParallelDims, device: torch.device
) -> None:
    """LoRA, fp8, activation checkpointing, sequence parallelism, compilation. Whoever calls this shards afterwards."""
    dims.validate(model.num_heads)
    check_attention(techniques.attention, device)
    set_attention(model, techniques.attention)
    if techniques.lora is not None:
        inject_lora(model, techniques.lora, variant)
    if techniques.fp8:
        check_fp8(device)
        convert_to_fp8(model)
    recompute = recompute_of(techniques.activation_checkpointing)
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpointing, module.contexts = recompute.checkpointing, recompute.contexts
    group = dims.ulysses_group(device.type)
    if group is not None:
        inject_ulysses(model, group)
    if techniques.compile:
        compile_blocks(model, num_shapes=techniques.num_shapes, budget=recompute.budget)


def _assemble_zero3(
    variant: Variant,
    reader: CheckpointReader,
    techniques: Techniques,
    dims: ParallelDims,
    device: torch.device,
) -> WanDenoiser:
    import deepspeed

    # The dtype goes through the config: zero.Init's own `dtype` is ignored on CPU, where it falls to bf16
    # (deepspeed 0.19 `_set_dtype`, operator precedence). It can be passed when that is mended.
    with deepspeed.zero.Init(config_dict_or_path=_zero_config(techniques.torch_dtype)):
        model = build_denoiser(variant, reader)
        _apply(model, variant, techniques, dims, device)
    fill_parameters(
        model,
        reader,
        seed=techniques.seed,
        gathered=lambda parameter: deepspeed.zero.GatheredParameters([parameter], modifier_rank=0),
        writes=dist.get_rank() == 0,
    )
    return model


def _zero_config(torch_dtype: torch.dtype) -> dict[str, Any]:
    """What zero.Init reads of the accelerate config; the batch size is only there because it insists on one."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": _bf16_over_masters(torch_dtype)},
    }
    if launched_offload() == "parameters":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return config


def _bf16_over_masters(torch_dtype: torch.dtype) -> bool:
    """Whether ZeRO's parameters are bf16, as mixed_precision makes them: its optimizer keeps the fp32 masters then.

    Raises:
        ValueError: bf16 weights without mixed precision, which would train without fp32 masters.
    """
    is_mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16"
    if torch_dtype == torch.bfloat16 and not is_mixed:
        raise ValueError(
            "model.torch_dtype=bfloat16 under ZeRO needs mixed_precision: bf16 in the accelerate config, or nothing "
            "keeps fp32 masters of what is trained"
        )
    return is_mixed
