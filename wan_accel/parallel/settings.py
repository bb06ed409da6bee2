"""What each field of an accelerate config does here: acted on, without consequence, or refused by name. Torch-free.

Checked against accelerate 1.15 (tests/parallel/test_settings.py walks its launcher's options).
"""

from dataclasses import dataclass

DEEPSPEED, FSDP, PARALLELISM = "deepspeed_config", "fsdp_config", "parallelism_config"
DYNAMO, FP8, TOP = "dynamo_config", "fp8_config", ""
_P = "parallelism_config_"

# Training acts on these, or accelerate and DeepSpeed do for it.
HONOURED: dict[str, tuple[str, ...]] = {
    TOP: ("distributed_type", "enable_cpu_affinity", "debug", FSDP, DEEPSPEED, PARALLELISM, DYNAMO, FP8),
    FSDP: ("fsdp_version", "fsdp_reshard_after_forward", "fsdp_offload_params"),
    DEEPSPEED: ("zero_stage",),
    PARALLELISM: (_P + "dp_replicate_size", _P + "dp_shard_size"),
}
# The launcher acts on these before our processes start.
LAUNCHER: dict[str, tuple[str, ...]] = {
    TOP: (
        "compute_environment", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
        "gpu_ids", "rdzv_backend", "same_network",
    ),
    DEEPSPEED: (
        "deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_inclusion_filter",
        "deepspeed_exclusion_filter",
    ),
}  # fmt: skip
# No effect, and nothing is lost by it: why.
HARMLESS: dict[str, dict[str, str]] = {
    TOP: {
        "main_training_function": "of notebooks and TPUs",
        "downcast_bf16": "of TPUs",
        **dict.fromkeys(
            (
                "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env", "command_file",
                "commands",
            ),
            "of TPUs, which distributed_type would have to name",
        ),
    },
    DYNAMO: dict.fromkeys(
        ("dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"),
        "nothing without dynamo_backend, which is refused",
    ),
    FP8: dict.fromkeys(
        (
            "fp8_backend", "fp8_use_autocast_during_eval", "fp8_margin", "fp8_interval", "fp8_format",
            "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_override_linear_precision", "fp8_opt_level",
            "fp8_enable_fsdp_float8_all_gather", "fp8_pad_inner_dim",
        ),
        "nothing without mixed_precision: fp8, which is refused",
    ),
    FSDP: {
        "fsdp_cpu_ram_efficient_loading": "every rank reads its own slices of a checkpoint anyway",
        "fsdp_sync_module_states": "obsolete in FSDP2; all ranks read the same checkpoint",
        "fsdp_use_orig_params": "obsolete in FSDP2, which always uses them",
        "fsdp_min_num_params": "nothing without SIZE_BASED_WRAP, which is refused",
    },
    DEEPSPEED: {
        "zero3_init_flag": "parameters are always partitioned while they are made",
        "offload_optimizer_nvme_path": "nothing without nvme, which is refused",
        "offload_param_nvme_path": "nothing without nvme, which is refused",
        "zero3_save_16bit_model": "`wan-accel export` writes whole weights, in any dtype",
    },
    PARALLELISM: dict.fromkeys(
        (
            _P + "cp_backend", _P + "cp_comm_strategy", _P + "sp_backend", _P + "sp_seq_length",
            _P + "sp_seq_length_is_variable", _P + "sp_attn_implementation",
        ),
        "nothing without cp_size or sp_size, which are refused",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A field that has no effect here, or a wrong one, but for some values.

    allowed: values, in lower case and `no` for false, that ask for nothing else than what happens.
    advice: what to do instead.
    env: where the launcher passes it on to the processes, None where it drops it.
    attribute: of accelerate's FSDP plugin, which is set only where it is asked for.
    recipe_only: a recipe decides it; in a loop of the user's own accelerate honours it.
    """

    section: str
    key: str
    advice: str
    allowed: tuple[str, ...] = ()
    env: str | None = None
    attribute: str | None = None
    recipe_only: bool = False


_RECIPE_COMPUTES = "set memory.activation_checkpointing in the recipe"
_DEGREE = "remove it, and set parallel.ulysses in the recipe (inject_ulysses in a loop of your own)"
_UNITS = "remove it: the denoiser is sharded block by block"

REFUSED: tuple[Refused, ...] = (
    Refused(section=TOP, key="mixed_precision", allowed=("no", "bf16"), env="ACCELERATE_MIXED_PRECISION",
            advice="use bf16 or 'no' (8-bit products: memory.fp8 in the recipe)"),
    Refused(section=TOP, key="use_cpu", allowed=("no",), advice="accelerate's launcher does not pass it on to several "
            "processes; set CUDA_VISIBLE_DEVICES= where there are GPUs that are not to be used"),
    Refused(section=TOP, key="megatron_lm_config", allowed=("no",), env="ACCELERATE_USE_MEGATRON_LM",
            advice="use a config of recipes/accelerate"),
    Refused(section=TOP, key="mpirun_config", advice="start the processes with accelerate launch alone"),
    Refused(section=DYNAMO, key="dynamo_backend", allowed=("no",), env="ACCELERATE_DYNAMO_BACKEND",
            advice="remove it, and set memory.compile: true in the recipe, which compiles block by block"),
    Refused(section=FSDP, key="fsdp_activation_checkpointing", allowed=("no",), advice=_RECIPE_COMPUTES,
            env="FSDP_ACTIVATION_CHECKPOINTING", attribute="activation_checkpointing"),
    Refused(section=FSDP, key="fsdp_activation_checkpointing_offload", allowed=("no",), advice="remove it",
            env="FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", attribute="activation_checkpointing_offload"),
    Refused(section=FSDP, key="fsdp_ignored_modules", env="FSDP_IGNORED_MODULES", attribute="ignored_modules",
            advice="remove it: every parameter of the denoiser is sharded"),
    Refused(section=FSDP, key="fsdp_auto_wrap_policy", allowed=("transformer_based_wrap",), advice=_UNITS,
            env="FSDP_AUTO_WRAP_POLICY", attribute="min_num_params"),
    Refused(section=FSDP, key="fsdp_transformer_layer_cls_to_wrap", allowed=("wanblock",), advice=_UNITS,
            env="FSDP_TRANSFORMER_CLS_TO_WRAP"),
    Refused(section=FSDP, key="fsdp_sharding_strategy", allowed=("full_shard", "1"), env="FSDP_SHARDING_STRATEGY",
            advice="it is of FSDP1; use fsdp_reshard_after_forward: false for SHARD_GRAD_OP, and "
                   "recipes/accelerate/hsdp.yaml for HYBRID_SHARD"),
    Refused(section=FSDP, key="fsdp_backward_prefetch", allowed=("backward_pre",), env="FSDP_BACKWARD_PREFETCH",
            advice="remove it: FSDP2 always gathers the next unit ahead in the backward pass"),
    Refused(section=FSDP, key="fsdp_forward_prefetch", allowed=("no",), env="FSDP_FORWARD_PREFETCH",
            advice="remove it: FSDP2 gathers the next unit ahead by itself"),
    Refused(section=FSDP, key="fsdp_state_dict_type", allowed=("sharded_state_dict",), env="FSDP_STATE_DICT_TYPE",
            advice="remove it: checkpoints are sharded, and `wan-accel export` writes whole weights", recipe_only=True),
    Refused(section=DEEPSPEED, key="gradient_accumulation_steps", allowed=("1", "auto"), recipe_only=True,
            env="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            advice="remove it: data.global_batch and data.micro_batch of the recipe decide"),
    Refused(section=DEEPSPEED, key="gradient_clipping", allowed=("auto",), env="ACCELERATE_GRADIENT_CLIPPING",
            advice="remove it, and set training.max_grad_norm in the recipe", recipe_only=True),
    Refused(section=DEEPSPEED, key="deepspeed_config_file", env="ACCELERATE_DEEPSPEED_CONFIG_FILE", recipe_only=True,
            advice="remove it, and set what recipes/accelerate/zero3.yaml shows in deepspeed_config itself"),
    Refused(section=DEEPSPEED, key="deepspeed_moe_layer_cls_names", env="ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
            advice="remove it: a Wan denoiser has no mixture-of-experts layers"),
    *(
        Refused(section=DEEPSPEED, key=f"offload_{part}_device", allowed=("cpu",),
                env=f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE",
                advice="use cpu or none: accelerate's launcher does not pass the path of an nvme on")
        for part in ("optimizer", "param")
    ),
    *(
        Refused(section=PARALLELISM, key=f"{_P}{axis}_size", allowed=("1",), advice=_DEGREE,
                env=f"PARALLELISM_CONFIG_{axis.upper()}_SIZE")
        for axis in ("tp", "cp", "sp")
    ),
)  # fmt: skip


def known_keys(section: str) -> set[str]:
    """Every field of a section that accelerate knows."""
    found = {*HONOURED.get(section, ()), *LAUNCHER.get(section, ()), *HARMLESS.get(section, {})}
    return found | {row.key for row in REFUSED if row.section == section}
