"""Every field of an accelerate config is classed, and what is refused is refused from the file and from a launch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig
from launched import launched_env, write_config

from wan_accel import train
from wan_accel.arguments import WanTrainingArguments
from wan_accel.parallel import settings
from wan_accel.parallel.config_checks import config_problems, launched_problems
from wan_accel.parallel.settings import DEEPSPEED, DYNAMO, FP8, FSDP, PARALLELISM, REFUSED, TOP, Refused, known_keys
from wan_accel.recipe.check import read_engine

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
GROUPS = {
    "DeepSpeed Arguments": DEEPSPEED, "FSDP Arguments": FSDP, "ParallelismConfig Arguments": PARALLELISM,
    "FP8 Arguments": FP8,
}  # fmt: skip
BASES = {DEEPSPEED: "zero3", FSDP: "fsdp2", PARALLELISM: "hsdp", DYNAMO: "fsdp2", FP8: "ddp", TOP: "ddp"}
# A value that asks for something else, in the words of a config file.
ASKED: dict[str, Any] = {
    "mixed_precision": "fp16", "use_cpu": True, "megatron_lm_config": {"megatron_lm_tp_degree": 2},
    "mpirun_config": {"mpirun_hostfile": "hosts"}, "dynamo_backend": "INDUCTOR", "fsdp_activation_checkpointing": True,
    "fsdp_activation_checkpointing_offload": True, "fsdp_ignored_modules": "head", "fsdp_auto_wrap_policy": "NO_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "DiTBlock", "fsdp_sharding_strategy": "SHARD_GRAD_OP",
    "fsdp_backward_prefetch": "NO_PREFETCH", "fsdp_forward_prefetch": True, "fsdp_state_dict_type": "FULL_STATE_DICT",
    "gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "deepspeed_config_file": "ds.json",
    "deepspeed_moe_layer_cls_names": "Block", "offload_optimizer_device": "nvme",
    "offload_param_device": "nvme", "parallelism_config_tp_size": 2, "parallelism_config_cp_size": 2,
    "parallelism_config_sp_size": 2,
}  # fmt: skip


def options(title: str) -> set[str]:
    (group,) = [group for group in launch.launch_command_parser()._action_groups if group.title == title]
    return {action.dest for action in group._group_actions}


@pytest.mark.parametrize("title", GROUPS)
def test_every_option_of_the_launcher_is_classed(title: str) -> None:
    assert options(title) - known_keys(GROUPS[title]) == set()


def test_every_field_of_a_config_file_is_classed_once() -> None:
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert fields == known_keys(TOP)
    dynamo = {action.dest for action in launch.launch_command_parser()._actions if action.dest.startswith("dynamo_")}
    assert dynamo == known_keys(DYNAMO)
    for section in (TOP, *BASES):
        rows = [row.key for row in REFUSED if row.section == section]
        for others in (settings.HONOURED, settings.LAUNCHER, settings.HARMLESS):
            rows += others.get(section, ())
        assert len(rows) == len(set(rows))


def asking(row: Refused, folder: Path) -> Path:
    """A shipped config file that asks for what a row refuses."""
    base = CONFIGS / f"{BASES[row.section]}.yaml"
    value = ASKED[row.key]
    changes = {row.key: value} if row.section == TOP else {row.section: {row.key: value}}
    if row.key == "fsdp_activation_checkpointing_offload":
        changes[FSDP]["fsdp_activation_checkpointing"] = True
    if row.key == "parallelism_config_sp_size":
        changes[PARALLELISM]["parallelism_config_sp_seq_length"] = 8
    return write_config(folder / "config.yaml", base, **changes)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.key)
def test_what_is_refused(row: Refused, tmp_path: Path) -> None:
    path = asking(row, tmp_path)
    with pytest.raises(ValueError, match=rf"{row.key}=.* is not honoured here: "):
        read_engine(path)
    env = launched_env(path) if row.key != "megatron_lm_config" else {"ACCELERATE_USE_MEGATRON_LM": "true"}
    found = [problem for problem in launched_problems(env) if problem.startswith(f"{row.key}=")]
    assert len(found) == (row.env is not None)
    # In a loop of the user's own accelerate does what a recipe decides in training.
    own = [problem for problem in launched_problems(env, has_recipe=False) if problem.startswith(f"{row.key}=")]
    assert own == ([] if row.recipe_only else found)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_are_taken(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert config_problems(yaml.safe_load(path.read_text())) == []
    assert launched_problems(launched_env(path)) == []


def test_what_accelerates_questions_write_is_taken(tmp_path: Path) -> None:
    """The fields that `accelerate config` writes beside those that are asked about."""
    general = {
        "debug": False, "downcast_bf16": "no", "enable_cpu_affinity": False, "machine_rank": 0, "num_machines": 1,
        "main_training_function": "main", "rdzv_backend": "static", "same_network": True, "tpu_env": [],
        "tpu_use_cluster": False, "tpu_use_sudo": False,
    }  # fmt: skip
    fsdp = {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_activation_checkpointing": False,
    }  # fmt: skip
    for name, section in (("fsdp2", {FSDP: fsdp}), ("zero3", {DEEPSPEED: {"zero3_save_16bit_model": True}})):
        path = write_config(tmp_path / f"{name}.yaml", CONFIGS / f"{name}.yaml", **general, **section)
        assert read_engine(path) == name
        assert launched_problems(launched_env(path)) == []


def test_fields_that_the_launcher_drops(tmp_path: Path) -> None:
    zero = write_config(tmp_path / "zero.yaml", CONFIGS / "zero3.yaml", deepspeed_config={"reduce_bucket_size": 1e8})
    message = "deepspeed_config.reduce_bucket_size is not a field that accelerate's launcher passes on: remove it"
    assert message in launched_problems(launched_env(zero))
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    config["fsdp_config"]["fsdp_reshard_after_foward"] = False
    assert config_problems(config) == [
        "fsdp_config.fsdp_reshard_after_foward is not a field that accelerate's launcher passes on: "
        "did you mean fsdp_reshard_after_forward?"
    ]
    config = {**yaml.safe_load((CONFIGS / "ddp.yaml").read_text()), "dynamo_backend": "INDUCTOR"}
    assert [problem.split(" ")[0] for problem in config_problems(config)] == ["dynamo_backend=inductor"]


def test_sections_of_another_engine(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "config.yaml", CONFIGS / "ddp.yaml", parallelism_config={"parallelism_config_dp_shard_size": 2}
    )
    with pytest.raises(ValueError, match="parallelism_config has no effect with distributed_type: MULTI_GPU: remove"):
        read_engine(path)
    assert launched_problems(launched_env(path)) == [
        "parallelism_config has no effect without distributed_type: FSDP: remove it"
    ]
    path.write_text("distributed_type: MEGATRON_LM\n")
    with pytest.raises(ValueError, match="distributed_type=MEGATRON_LM is not supported: use recipes/accelerate"):
        read_engine(path)
    path.write_text("distributed_type: MULTI_CPU\n")
    with pytest.raises(ValueError, match=r"MULTI_CPU is not supported: use MULTI_GPU, on CPUs too \(accelerate starts"):
        read_engine(path)


def test_a_run_stops_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match="dynamo_backend=inductor is not honoured here"):
        WanTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    missing = [f"model.checkpoint={tmp_path / 'none'}", f"data.latents={tmp_path / 'none'}", "parallel.ulysses=1"]
    assert train.main(["t2v-1.3b/lora", *missing, f"training.output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "dynamo_backend=inductor is not honoured here: remove it, and set memory.compile" in error
    assert "fsdp_activation_checkpointing=true is not honoured here: set memory.activation_checkpointing" in error
