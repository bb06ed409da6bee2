"""Rules across sections, all at once and without side effects: no GPU, no network, no process group. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from wan_accel.models.compile_rules import compile_problems
from wan_accel.models.hub import is_hub_id
from wan_accel.models.variants import Variant, get_variant
from wan_accel.optimizers import optimizer_problem
from wan_accel.parallel.config_checks import config_problems
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.names import Offload, engine_of_stage, is_zero, zero_offload
from wan_accel.recipe.check_data import check_data
from wan_accel.recipe.schema import Objective, Recipe
from wan_accel.sample_schedule import drawn_sigmas


def check(
    recipe: Recipe,
    *,
    world_size: int | None = None,
    engine: str | None = None,
    offload: Offload = "none",
    num_heads: int | None = None,
) -> list[str]:
    """Every problem of a recipe on a layout, one line each; an empty list means it fits.

    Args:
        recipe: a loaded recipe.
        world_size: processes, where known.
        engine: `single`, `ddp`, `fsdp2`, `hsdp`, `zero2` or `zero3`, where known.
        offload: what the engine keeps in host memory.
        num_heads: of the checkpoint; by default what its config.json says, or as released where it is not there yet.
    """
    try:
        variant = get_variant(recipe.variant)
    except ValueError as error:
        return [str(error)]
    problems = _check_variant(recipe, variant)
    problems += _check_objective(recipe.objective)
    problems += _check_batches(recipe)
    problems += check_data(recipe, variant)
    problems += compile_problems(recipe.memory, engine)
    problems += _check_parallel(recipe, world_size, num_heads)
    if recipe.model.revision is not None and not is_hub_id(recipe.model.checkpoint):
        problems.append(
            f"model.revision={recipe.model.revision} is of a hub id, and model.checkpoint={recipe.model.checkpoint} is "
            "a local folder: remove the key"
        )
    problems += _check_method(recipe, engine, offload)
    problems += _check_sample(recipe, variant)
    folders = [("data.latents", recipe.data.latents), ("data.clips", recipe.data.clips)]
    folders += [(f"data.datasets[{number}].path", part.path) for number, part in enumerate(recipe.data.datasets)]
    for key, path in folders:
        if path is not None and "://" in path:
            problems.append(
                f"{key}={path} is remote: every process would copy all of it. Stage it first, e.g. "
                f"`aws s3 sync {path} /local/{Path(path).name}`, and give the local folder"
            )
    if recipe.method.kind == "full" and recipe.model.torch_dtype != "float32" and not is_zero(engine):
        problems.append(
            "model.torch_dtype=bfloat16 with method.kind=full: small updates would be rounded away; use float32 (the "
            "accelerate config's mixed_precision: bf16 computes in bfloat16)"
        )
    return problems


def _check_variant(recipe: Recipe, variant: Variant) -> list[str]:
    problems = []
    names = [expert.name for expert in variant.experts]
    if len(names) == 1 and recipe.model.expert is not None:
        problems.append(f"model.expert={recipe.model.expert}: {variant.name} has one expert only; remove the key")
    else:
        try:
            variant.trained_experts(recipe.model.expert)
        except ValueError as error:
            problems.append(str(error))
    if recipe.data.face_dropout and not variant.has_animate_adapter:
        problems.append(
            f"data.face_dropout={recipe.data.face_dropout}: {variant.name} has no face input; remove the key"
        )
    if recipe.data.image_dropout and not variant.fuses_first_frame:
        problems.append(
            f"data.image_dropout={recipe.data.image_dropout}: {variant.name} is not trained with and without a first "
            "frame; remove the key (ti2v-5b is)"
        )
    return problems


def _check_batches(recipe: Recipe) -> list[str]:
    problems = []
    for name, batch in (("global_batch", recipe.data.global_batch), ("micro_batch", recipe.data.micro_batch)):
        if (batch.samples is None) == (batch.tokens is None):
            problems.append(f"data.{name} needs samples or tokens, one of them: write {{samples: N}} or {{tokens: N}}")
        if batch.multiple_of > 1 and (batch.tokens is None or name == "micro_batch"):
            problems.append(f"data.{name}.multiple_of has an effect only in data.global_batch with tokens: remove it")
    return problems


# Keys of the objective that have an effect only with one density.
_DENSITY_OF = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}


def _check_objective(objective: Objective) -> list[str]:
    plain = Objective()
    given = [field.name for field in fields(Objective) if getattr(objective, field.name) != getattr(plain, field.name)]
    if objective.preset is not None:
        extra = [name for name in given if name not in ("preset", "on_nan")]
        return [f"objective.{name} has no effect with preset={objective.preset}: remove one of them" for name in extra]
    return [
        f"objective.{name} has no effect with density={objective.density}: remove it, or set density: {density}"
        for name, density in _DENSITY_OF.items()
        if name in given and objective.density != density
    ]


def _check_method(recipe: Recipe, engine: str | None, offload: Offload) -> list[str]:
    problems = []
    optim = optimizer_problem(recipe.training.get("optim", "adamw_torch"), engine, offload)
    if optim is not None:
        problems.append(optim)
    if recipe.method.ema is not None and engine == "zero3" and offload != "none":
        problems.append("method.ema cannot be used with ZeRO-3's offloading yet: use ZeRO-2 or FSDP2, or remove it")
    if recipe.validation.ema and recipe.method.ema is None:
        problems.append("validation.ema=true without a moving average: set method.ema, e.g. {decay: 0.9999}")
    return problems


def _check_sample(recipe: Recipe, variant: Variant) -> list[str]:
    sample = recipe.validation.sample
    if sample is None:
        return []
    problems = []
    if not recipe.validation.every_steps:
        problems.append("validation.sample without validation.every_steps: set it, e.g. to 250")
    if sample.ground_truth == "clips" and recipe.data.clips is None:
        problems.append("validation.sample.ground_truth=clips needs data.clips: set it, or use latents")
    experts = [expert for expert in variant.experts if recipe.model.expert == expert.name] or variant.experts
    try:
        drawn_sigmas(sample.num_steps, variant.shift, experts)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _num_heads(checkpoint: Path, variant: Variant) -> int | None:
    """Heads as a local checkpoint's config.json says, which no tensor shows; as released where it is not there yet."""
    if not checkpoint.is_dir():
        return variant.dit.num_heads
    for folder in (variant.experts[0].folder, "transformer"):
        file = checkpoint / folder / "config.json"
        if file.is_file():
            config = json.loads(file.read_text())
            return config.get("num_heads", config.get("num_attention_heads"))
    return None


def _check_parallel(recipe: Recipe, world_size: int | None, num_heads: int | None) -> list[str]:
    ulysses, variant = recipe.parallel.ulysses, get_variant(recipe.variant)
    heads = num_heads or _num_heads(Path(recipe.model.checkpoint), variant)
    problems = []
    if heads is not None and heads % ulysses:
        degrees = ", ".join(map(str, usable_degrees(heads)))
        problems.append(f"parallel.ulysses={ulysses} does not divide num_heads={heads} ({variant.name}): use {degrees}")
    if world_size is None:
        return problems
    if world_size % ulysses:
        problems.append(
            f"parallel.ulysses={ulysses} does not divide the {world_size} processes: start a multiple of {ulysses}"
        )
        return problems
    data_ranks, batch = world_size // ulysses, recipe.data.global_batch
    key, samples = ("multiple_of", batch.multiple_of) if batch.tokens else ("samples", batch.samples or 1)
    if samples % data_ranks:
        problems.append(
            f"data.global_batch.{key}={samples} is not a multiple of the {data_ranks} data ranks ({world_size} "
            f"processes / ulysses {ulysses}): some would idle in every step; use {samples + -samples % data_ranks}"
        )
    return problems


_PLAIN_ENGINES = {"NO": "single", "MULTI_GPU": "ddp"}


def read_engine(path: Path) -> str:
    """The engine of an accelerate config file.

    Raises:
        ValueError: the file cannot be read, or asks for an engine or a setting that is not supported.
    """
    config = _read_config(path)
    engine = _engine_of(path, config)
    problems = config_problems(config)
    if problems:
        raise ValueError("\n".join([f"{path} asks for what is not done here:", *problems]))
    return engine


def _engine_of(path: Path, config: Mapping[str, Any]) -> str:
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        try:
            return engine_of_stage((config.get("deepspeed_config") or {}).get("zero_stage"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if kind == "FSDP":
        if (config.get("fsdp_config") or {}).get("fsdp_version") != 2:
            raise ValueError(f"{path}: only fsdp_version: 2 is supported")
        replicas = (config.get("parallelism_config") or {}).get("parallelism_config_dp_replicate_size", 1)
        return "fsdp2" if replicas == 1 else "hsdp"
    if kind not in _PLAIN_ENGINES:
        is_cpu = kind == "MULTI_CPU"
        advice = "MULTI_GPU, on CPUs too (accelerate starts one process)" if is_cpu else "recipes/accelerate"
        raise ValueError(f"{path}: distributed_type={kind} is not supported: use {advice}")
    return _PLAIN_ENGINES[kind]


def read_offload(path: Path) -> Offload:
    """What an accelerate config file asks to be kept in host memory.

    Raises:
        ValueError: the file cannot be read, or asks for what is not supported.
    """
    config = _read_config(path)
    engine = _engine_of(path, config)
    if engine in ("fsdp2", "hsdp"):
        return "parameters" if (config.get("fsdp_config") or {}).get("fsdp_offload_params") else "none"
    if not is_zero(engine):
        return "none"
    zero = config.get("deepspeed_config") or {}
    try:
        places = {part: str(zero.get(f"offload_{part}_device", "none")) for part in ("optimizer", "param")}
        return zero_offload(engine, **places)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"accelerate config {path} cannot be read: {error}") from None
