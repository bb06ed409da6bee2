"""The table of transformers' TrainingArguments: what passes through, what a recipe or accelerate owns. Torch-free.

Checked against transformers 5.17 to 5.23: a field that stands in no column fails a test.
"""

import difflib
from collections.abc import Callable
from typing import Any

from wan_accel.models.variants import get_variant
from wan_accel.recipe.schema import Recipe

# Set in `training:` and handed on as they are.
PASSED = frozenset(
    [
        "output_dir",
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "optim_target_modules",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_strategy",
        "logging_first_step",
        "logging_steps",
        "logging_nan_inf_filter",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "seed",
        "run_name",
        "disable_tqdm",
        "report_to",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "ddp_static_graph",
        "skip_memory_metrics",
        "include_for_metrics",
        "full_determinism",
        "use_cpu",
        "debug",
        "tf32",
        "greater_is_better",
        "metric_for_best_model",
    ]
)
# WanTrainingArguments' own that stand in `training:` beside the library's; the others have sections of their own.
ADDED = frozenset(["async_save", "hang_seconds"])
# Owned by another key of the recipe.
OURS = {
    "gradient_checkpointing": "memory.activation_checkpointing",
    "gradient_checkpointing_kwargs": "memory.activation_checkpointing",
    "activation_checkpointing": "memory.activation_checkpointing",
    "activation_checkpointing_kwargs": "memory.activation_checkpointing",
    "per_device_train_batch_size": "data.global_batch and data.micro_batch",
    "per_device_eval_batch_size": "validation.sigmas",
    "gradient_accumulation_steps": "data.global_batch and data.micro_batch",
    "auto_find_batch_size": "data.micro_batch",
    "group_by_length": "nothing: the step plan buckets by shape",
    "length_column_name": "nothing: the step plan buckets by shape",
    "train_sampling_strategy": "nothing: the step plan orders the samples",
    "eval_strategy": "validation.every_steps",
    "eval_steps": "validation.every_steps",
    "eval_delay": "validation.every_steps",
    "eval_on_start": "validation.every_steps",
    "eval_accumulation_steps": "validation.sigmas",
    "eval_do_concat_batches": "validation.sigmas",
    "eval_use_gather_object": "validation.sigmas",
    "batch_eval_metrics": "validation.sigmas",
    "prediction_loss_only": "validation.sigmas",
    "bf16_full_eval": "the accelerate config (mixed_precision)",
    "fp16_full_eval": "the accelerate config (mixed_precision)",
    "data_seed": "training.seed",
    "remove_unused_columns": "nothing: latents have no unused columns",
    "label_names": "nothing: latents have no labels",
    "label_smoothing_factor": "nothing: latents have no labels",
    "ignore_data_skip": "nothing: the step plan starts a resumed run at its step",
    "dataloader_in_order": "nothing: the step plan orders the samples",
    "dataloader_drop_last": "nothing: the step plan uses every sample once an epoch",
    "do_train": "nothing: use wan_accel.train or wan_accel.evaluate",
    "do_eval": "nothing: use wan_accel.train or wan_accel.evaluate",
    "do_predict": "nothing: use wan_accel.train or wan_accel.evaluate",
    "include_num_input_tokens_seen": "nothing: tokens per second are always logged",
    "load_best_model_at_end": "nothing: export the checkpoint you want",
    "save_only_model": "nothing: checkpoints always resume; wan-accel export writes the model",
    "save_on_each_node": "nothing: checkpoints are written once, to a shared disk",
    "restore_callback_states_from_checkpoint": "nothing",
    "enable_jit_checkpoint": "nothing yet",
    "push_to_hub": "wan-accel export --push-to-hub",
    "hub_model_id": "wan-accel export --push-to-hub",
    "hub_strategy": "wan-accel export --push-to-hub",
    "hub_token": "the login of huggingface_hub (hf auth login)",
    "hub_private_repo": "wan-accel export --push-to-hub",
    "hub_always_push": "wan-accel export --push-to-hub",
    "hub_revision": "wan-accel export --push-to-hub",
    "dataloader_multiprocessing_context": "nothing: workers are started as the platform does",
    "dataloader_persistent_workers": "nothing: workers live as long as the run",
    "torch_empty_cache_steps": "nothing: steps have the same shapes again and again",
    "neftune_noise_alpha": "nothing: it is for language models",
    "use_liger_kernel": "nothing: it is for language models",
    "liger_kernel_config": "nothing: it is for language models",
    "average_tokens_across_devices": "nothing: the loss is a mean over samples",
    "use_cache": "nothing: it is for language models",
    "torch_compile": "memory.compile",
    "torch_compile_backend": "memory.compile",
    "torch_compile_mode": "memory.compile",
}
# Owned by the accelerate config.
ACCELERATES = frozenset(
    [
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "parallelism_config",
        "accelerator_config",
        "ddp_backend",
        "ddp_find_unused_parameters",
        "ddp_broadcast_buffers",
        "local_rank",
        "fp16",
        "bf16",
        "place_model_on_device",
    ]
)
# Where the library's default would hurt.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "log_on_each_node": False,
    "save_total_limit": 3,
    "dataloader_num_workers": 4,
    "resume_from_checkpoint": "auto",
}


_STRATEGIES = ("save_strategy", "logging_strategy")


def with_no_as_written(training: dict[str, Any]) -> dict[str, Any]:
    """`training:` with the strategy `no` as its text: YAML 1.1 reads it as false."""
    return {**training, **{field: "no" for field in _STRATEGIES if training.get(field) is False}}


def problems_of(training: dict[str, Any], where: Callable[[str], str]) -> list[str]:
    """Refuse what `training:` may not set, one line each. `where` gives a field's file and line."""
    problems = []
    for field in training:
        if field in OURS:
            problems.append(f"{where(field)}: training.{field}: belongs to {OURS[field]}")
        elif field in ACCELERATES:
            problems.append(f"{where(field)}: training.{field}: belongs to the accelerate config (--config_file)")
        elif field not in PASSED | ADDED:
            near = difflib.get_close_matches(field, PASSED | ADDED, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ": it is not a field of TrainingArguments"
            problems.append(f"{where(field)}: training.{field}: unknown key{hint}")
    for field in _STRATEGIES:
        if training.get(field) == "epoch":  # Trainer sees one endless epoch, so it would mean once, at the end
            problems.append(f"{where(field)}: training.{field}: epoch is not supported: use steps")
    if "output_dir" not in training:
        problems.append(f"{where('output_dir')}: training.output_dir: missing")
    return problems


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `WanTrainingArguments` for a recipe."""
    objective = recipe.objective
    is_diffsynth = objective.preset == "diffsynth"
    arguments = {
        **DEFAULTS,
        **recipe.training,
        "global_batch": recipe.data.global_batch.samples or 1,
        "global_batch_tokens": recipe.data.global_batch.tokens,
        "batch_multiple_of": recipe.data.global_batch.multiple_of,
        "micro_batch": recipe.data.micro_batch.samples or 1,
        "micro_batch_tokens": recipe.data.micro_batch.tokens,
        "caption_dropout": recipe.data.caption_dropout,
        "face_dropout": recipe.data.face_dropout,
        "image_dropout": recipe.data.image_dropout,
        "ulysses": recipe.parallel.ulysses,
        "density": "uniform" if is_diffsynth else objective.density,
        "shift": 5.0 if is_diffsynth else objective.shift or get_variant(recipe.variant).shift,
        "logit_mean": objective.logit_mean,
        "logit_std": objective.logit_std,
        "mode_scale": objective.mode_scale,
        "weighting": "bell" if is_diffsynth else objective.weighting,
        "eval_sigmas": recipe.validation.sigmas,
        "eval_ema": recipe.validation.ema,
        "on_nan": objective.on_nan,
    }
    if recipe.method.ema is not None:
        ema = recipe.method.ema
        arguments |= {"ema_decay": ema.decay, "ema_update_every": ema.update_every, "ema_device": ema.device}
    if recipe.validation.every_steps:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.validation.every_steps,
            "eval_on_start": True,
        }
    return arguments
