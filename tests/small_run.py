"""A trainer over a tiny checkpoint and made-up conditions, as `wan_accel.train` would put it together."""

import os
from pathlib import Path
from typing import Any

import torch
from synthetic import GLOBAL_BATCH, SyntheticSource, plan_for

LORA = {"r": 4, "lora_alpha": 8.0}


def small_trainer(
    base: str, output_dir: str, engine: str, *, method: str = "full", source: Any = None, callbacks: Any = (),
    torch_dtype: torch.dtype = torch.float32, **arguments: Any,
) -> Any:  # fmt: skip
    """`WanTrainer` on `engine`, whose environment `run_ranks` has set; `arguments` replace the defaults below."""
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.assemble import Techniques, assemble
    from wan_accel.lora import LoraSettings
    from wan_accel.models.loading import CheckpointReader
    from wan_accel.models.variants import VARIANTS
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.parallel.engine import launched_engine
    from wan_accel.parallel.mesh import ParallelDims
    from wan_accel.trainer import WanTrainer

    enable_fsdp_on_cpu()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    defaults: dict[str, Any] = {
        "max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "global_batch": GLOBAL_BATCH,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True,
        "use_cpu": not engine.startswith("zero"), "ddp_backend": "gloo" if world_size > 1 else None,
    }  # fmt: skip
    args = WanTrainingArguments(output_dir=output_dir, **{**defaults, **arguments})
    variant = VARIANTS["t2v-1.3b"]
    lora = LoraSettings(**LORA) if method == "lora" else None  # type: ignore[arg-type]
    device = args.device
    model = assemble(
        variant, CheckpointReader(Path(base)), Techniques(lora=lora, seed=args.seed, torch_dtype=torch_dtype),
        engine=launched_engine(),
        dims=ParallelDims(world_size=world_size, ulysses=args.ulysses, dp_replicate=2 if engine == "hsdp" else 1),
        device=device,
    )  # fmt: skip
    model.text_length = 16
    source = source or SyntheticSource("t2v-1.3b")
    return WanTrainer(
        model, args, source, plan_for(source), variant=variant, lora=lora, base=base, callbacks=callbacks
    )


def full_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Trained weights, whole. Collective."""
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if not parameter.requires_grad:
            continue
        if trainer.engine.startswith("zero"):
            from deepspeed.utils import safe_get_full_fp32_param

            weights[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            data = parameter.data
            weights[name] = (data.full_tensor() if hasattr(data, "full_tensor") else data).clone()
    return weights


def logged(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]
