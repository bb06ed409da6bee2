"""The environment into which accelerate's own launcher turns a config file, and what is then in force on a rank."""

from pathlib import Path
from typing import Any

import yaml
from accelerate.commands import launch
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def launched_env(path: Path, *options: str, processes: int = 2) -> dict[str, str]:
    """What `accelerate launch --config_file path` adds to the environment of the processes that it starts."""
    parser = launch.launch_command_parser()
    command = ["--config_file", str(path), "--num_processes", str(processes), "--main_process_port", "0", *options]
    args, defaults, is_from_config = launch._validate_launch_command(parser.parse_args([*command, "script.py"]))
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if is_from_config else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        env = prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp or args.multi_gpu:
        env = prepare_multi_gpu_env(args)
    else:
        env = prepare_simple_launcher_cmd_env(args)[1]
    return {name: value for name, value in env.items() if name.startswith(PREFIXES)}


def write_config(path: Path, base: Path, **changes: Any) -> Path:
    """A config file with other fields; dicts are merged into their sections."""
    config = yaml.safe_load(base.read_text())
    for name, value in changes.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(config))
    return path


def fsdp_units(model: Any) -> dict[str, dict[str, Any]]:
    """What FSDP2 really does, a unit at a time: parameters, mesh, dtypes, resharding, offloading."""
    from torch.distributed.fsdp import FSDPModule

    units = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            units[name] = {
                "parameters": sorted(p._param_fqn or p._module_info.param_name for p in group.fsdp_params),
                "mesh": (tuple(group.mesh_info.mesh.shape), tuple(group.mesh_info.mesh.mesh.flatten().tolist())),
                "placements": [str(p.sharded_param.placements) for p in group.fsdp_params],
                "param_dtype": group.mp_policy.param_dtype,
                "reduce_dtype": group.mp_policy.reduce_dtype,
                "output_dtype": group.mp_policy.output_dtype,
                "casts_inputs": group.mp_policy.cast_forward_inputs,
                "reshards": group._reshard_after_forward,
                "offload": type(group.offload_policy).__name__,
            }
    return units


def in_force(base: str, output_dir: str, engine: str) -> dict[str, Any]:
    """The settings of a training run after a step of it, read off the objects that act on them."""
    from small_run import small_trainer
    from transformers import training_args

    from wan_accel.parallel.engine import launched_engine
    from wan_accel.plan.misfit import launched_layout
    from wan_accel.train import _launch_arguments

    launch_arguments = _launch_arguments()
    if launch_arguments.get("bf16"):
        # transformers takes bf16 under DeepSpeed for GPUs only, which DeepSpeed itself does not.
        training_args.is_torch_bf16_gpu_available = lambda: True
    trainer = small_trainer(
        base, output_dir, engine, max_steps=1, save_strategy="no", max_grad_norm=0.25,
        **{"use_cpu": False, **launch_arguments},
    )  # fmt: skip
    trainer.train()
    accelerator = trainer.accelerator
    found = {
        "engine": trainer.engine,
        "launched": launched_engine(),
        "layout": launched_layout(1),
        "dims": (trainer.dims.dp_replicate, trainer.dims.dp_shard),
        "precision": accelerator.mixed_precision,
        "accumulation": accelerator.gradient_accumulation_steps,
        "dynamo": accelerator.state.dynamo_plugin.backend.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "dtypes": {str(parameter.dtype) for parameter in trainer.model.parameters()},
    }
    if trainer.engine == "fsdp2":
        found["units"] = fsdp_units(trainer.model)
    if hasattr(trainer.model_wrapped, "zero_optimization_stage"):
        found["zero"] = _zero_in_force(trainer.model_wrapped)
    return found


def _zero_in_force(engine: Any) -> dict[str, Any]:
    zero = engine._config.zero_config
    return {
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
        "bf16": engine.bfloat16_enabled(),
        "offload": tuple(
            "none" if part is None else str(getattr(part.device, "value", part.device))
            for part in (zero.offload_optimizer, zero.offload_param)
        ),
        "reduce_bucket_size": int(zero.reduce_bucket_size),
        "is_partitioned": all(hasattr(p, "ds_tensor") for p in engine.module.parameters()),
    }
