"""How a trainer's model and optimizer are put on its engine, where Trainer's own way does not fit."""

from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from wan_accel.metrics import write_run_state
from wan_accel.models.denoiser import WanDenoiser, inject_ulysses
from wan_accel.models.pair import ExpertPair
from wan_accel.parallel.fsdp import assert_sharded, fully_shard_denoiser, offloads
from wan_accel.parallel.names import is_zero
from wan_accel.parallel.zero import JointOptimizer, prepare_engine
from wan_accel.watchdog import Watchdog

if TYPE_CHECKING:
    from wan_accel.trainer import WanTrainer


def dp_replicate(accelerator: Any) -> int:
    """HSDP's number of replicas, from accelerate's parallelism config."""
    config = getattr(accelerator, "parallelism_config", None)
    return config.dp_replicate_size if config is not None else 1


def apply_parallelism(trainer: "WanTrainer", model: WanDenoiser) -> None:
    """Ulysses, then sharding, where the caller has not applied them."""
    device_type = trainer.accelerator.device.type
    if trainer.args.ulysses > 1 and model.sequence_parallel is None:
        group = trainer.dims.ulysses_group(device_type)
        assert group is not None
        inject_ulysses(model, group)
    if trainer.engine == "fsdp2":
        if not isinstance(model, FSDPModule):
            plugin = trainer.accelerator.state.fsdp_plugin
            if not offloads(plugin):
                model.to(trainer.accelerator.device)
            fully_shard_denoiser(model, plugin, trainer.dims.shard_mesh(device_type))
        assert_sharded(model)


def start_watchdog(trainer: "WanTrainer") -> Watchdog:
    """The watchdog of a run, with its files in the output_dir. Collective."""
    rank, output = trainer.args.process_index, trainer.output_dir
    return Watchdog(
        rank=rank,
        world_size=trainer.args.world_size,
        hang_seconds=trainer.args.hang_seconds,
        stack_file=output / "logs" / f"rank-{rank}.stack",
        on_end=lambda message: write_run_state(output, "failed", trainer.state.global_step, message),
    )


def prepare_sharded(trainer: "WanTrainer", max_steps: int) -> nn.Module:
    """Register an already sharded model and its optimizer with accelerate.

    `accelerator.prepare` maps the optimizer's parameters by data pointer (accelerate 1.15,
    `fsdp2_switch_optimizer_parameters`). Ranks beyond a short dim 0, such as a modulation's 1, hold empty
    shards that all have pointer 0, so it would mix them up. It can go when accelerate maps by name.
    """
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer, device_placement=False)
    trainer.accelerator._optimizers.append(trainer.optimizer)
    trainer.accelerator._models.append(trainer.module)
    trainer.create_scheduler(num_training_steps=max_steps)
    trainer.model_wrapped = trainer.module
    return trainer.module


def prepare_pair(trainer: "WanTrainer", pair: ExpertPair, max_steps: int) -> nn.Module:
    """Wrap each expert by itself. Under ZeRO each has an engine with its own optimizer, which steps by itself."""
    if is_zero(trainer.engine):
        trainer.lanes, trainer.optimizer = _prepare_zero_pair(trainer, pair, max_steps)
    else:
        trainer.create_optimizer()
        trainer.optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
        trainer.lanes = {name: trainer.accelerator.prepare_model(expert) for name, expert in pair.named_children()}
    trainer.create_scheduler(num_training_steps=max_steps)
    trainer.model_wrapped = pair
    return pair


def _prepare_zero_pair(
    trainer: "WanTrainer", pair: ExpertPair, max_steps: int
) -> tuple[dict[str, nn.Module], JointOptimizer]:
    plugin = trainer.accelerator.state.deepspeed_plugin
    plugin.hf_ds_config.trainer_config_finalize(trainer.args, pair, max_steps)  # fills what is "auto"
    engines, optimizers = {}, []
    for name, expert in pair.named_children():
        trainer.optimizer = None
        engines[name], optimizer = prepare_engine(trainer.accelerator, expert, trainer.create_optimizer(expert))
        optimizers.append(optimizer)
    return engines, JointOptimizer(optimizers)
