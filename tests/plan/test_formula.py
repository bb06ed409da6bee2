"""Bytes by formula: of released sizes by hand, of every optimizer as it is, and of a real DeepSpeed engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import small_trainer
from transformers import Trainer

from wan_accel.arguments import WanTrainingArguments
from wan_accel.assemble import Techniques
from wan_accel.lora import LoraSettings
from wan_accel.models.reader import CheckpointReader
from wan_accel.models.variants import VARIANTS
from wan_accel.optimizers import DEFAULT_OPTIM, state_bytes, usable_optimizers
from wan_accel.plan.ask import units_of_skeleton
from wan_accel.plan.collectives import CountCollectives
from wan_accel.plan.formula import (
    Load,
    StepMemory,
    Trained,
    fixed_bytes,
    gathered_bytes,
    optimizer_step_bytes,
    peak_of,
)
from wan_accel.plan.layout import Layout, Offload
from wan_accel.plan.traffic import micro_step_traffic
from wan_accel.plan.verdict import GIB, Budget, parse_memory
from wan_accel.plan.weights import Unit, Weight, released_shapes, total

BILLIONS = {"t2v-a14b": 14.288, "ti2v-5b": 5.000, "animate-14b": 17.252, "t2v-1.3b": 1.419}
ADAMW = Trained(optim="adamw_torch_fused")


def units_for(variant: str, method: str = "full") -> tuple[Unit, ...]:
    row = VARIANTS[variant]
    lora = LoraSettings(r=32) if method == "lora" else None
    dtype = torch.bfloat16 if lora else torch.float32
    return units_of_skeleton(row, released_shapes(row), Techniques(lora=lora, torch_dtype=dtype))


@pytest.mark.parametrize("variant", BILLIONS)
def test_released_sizes_over_64_ranks(variant: str) -> None:
    """To 2%: what ceil-sized shards of small parameters add."""
    units = units_for(variant)
    count = total(weight for unit in units for weight in unit.weights)
    assert count / 1e9 == pytest.approx(BILLIONS[variant], abs=1e-3)
    for layout in (Layout(engine="fsdp2", world_size=64), Layout(engine="hsdp", world_size=128, dp_replicate=2)):
        fixed = fixed_bytes(units, layout, ADAMW)
        assert fixed.parameters == pytest.approx(4 * count / 64, rel=0.02)
        assert fixed.gradients == fixed.parameters and fixed.optimizer == 2 * fixed.parameters
    zero = fixed_bytes(units, Layout(engine="zero3", world_size=64), ADAMW)
    assert (zero.parameters, zero.gradients) == pytest.approx((2 * count / 64, 2 * count / 64), rel=1e-3)
    assert zero.optimizer == pytest.approx(12 * count / 64, rel=1e-3)  # fp32 masters and moments
    half = fixed_bytes(units, Layout(engine="zero2", world_size=64), ADAMW)
    assert half.parameters == 2 * count and half.gradients == pytest.approx(2 * count / 64)
    assert half.optimizer == pytest.approx(12 * count / 64)
    whole = fixed_bytes(units, Layout(engine="ddp", world_size=64), ADAMW)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (4 * count, 4 * count, 8 * count)


def test_a_lora_over_a_bf16_base() -> None:
    units = units_for("t2v-a14b", "lora")
    weights = [weight for unit in units for weight in unit.weights]
    adapters = 40 * 32 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    assert total(weights, trained=True) == adapters
    layout = Layout(engine="fsdp2", world_size=8)
    fixed = fixed_bytes(units, layout, Trained(optim="adamw_torch", ema="accelerator", num_experts=2))
    assert fixed.parameters == pytest.approx(2 * (2 * (total(weights) - adapters) + 4 * adapters) / 8, rel=0.02)
    assert (fixed.gradients, fixed.ema) == pytest.approx((2 * 4 * adapters / 8,) * 2, rel=0.02)
    assert fixed.optimizer == 2 * fixed.gradients
    on_host = fixed_bytes(units, layout, Trained(optim="adamw_torch", ema="cpu", num_experts=2))
    assert (on_host.ema, on_host.host) == (0, fixed.ema)


def test_offloading() -> None:
    units = units_for("ti2v-5b")
    count = total(weight for unit in units for weight in unit.weights)
    fixed = {
        offload: fixed_bytes(units, Layout(engine="zero3", world_size=8, offload=offload), ADAMW)  # type: ignore[arg-type]
        for offload in ("none", "optimizer", "parameters")
    }
    assert fixed["none"].total == pytest.approx(16 * count / 8, rel=1e-3) and fixed["none"].host == 0
    assert fixed["optimizer"].total == pytest.approx(2 * count / 8, rel=1e-3)
    assert fixed["optimizer"].host == pytest.approx(18 * count / 8, rel=1e-3)
    sharded = fixed_bytes(units, Layout(engine="fsdp2", world_size=8, offload="parameters"), ADAMW)
    assert sharded.total == 0 and sharded.host == pytest.approx(16 * count / 8, rel=0.01)
    half = fixed_bytes(units, Layout(engine="zero2", world_size=8, offload="optimizer"), ADAMW)
    assert half.total == 2 * count and half.host == pytest.approx(20 * count / 8)
    assert fixed["parameters"].total == 0 and fixed["parameters"].host == pytest.approx(20 * count / 8, rel=1e-3)


def test_buffers_by_hand() -> None:
    block = Unit(weights=(Weight(shape=(100, 10), itemsize=4, is_trained=True),))
    small = Unit(weights=(Weight(shape=(8, 10), itemsize=4, is_trained=False),))
    root = Unit(weights=(Weight(shape=(1, 6), itemsize=4, is_trained=True),), is_root=True)
    units = (block, block, small, root)
    # On 8 ranks a shard of the block has 13 rows, one of the root's its only row.
    gathered, reduced, around = 2 * 8 * 13 * 10, 4 * 8 * 13 * 10, 2 * 8 * 6
    layout = Layout(engine="fsdp2", world_size=8)
    assert gathered_bytes(units, layout) == around + 2 * gathered + reduced
    kept = Layout(engine="fsdp2", world_size=8, reshard_after_forward=False)
    assert gathered_bytes(units, kept) == around + 2 * gathered + 2 * 8 * 10 + reduced
    assert gathered_bytes(units, Layout(engine="ddp", world_size=8)) == 4 * (2 * 1000 + 6)
    assert gathered_bytes(units, Layout(engine="single", world_size=1)) == 0
    on_host = Layout(engine="fsdp2", world_size=8, offload="parameters")
    assert gathered_bytes(units, on_host) == gathered_bytes(units, layout) + 2 * 4 * 13 * 10
    assert gathered_bytes(units, Layout(engine="zero2", world_size=8)) == 2 * (500_000_000 + 2006)
    # ZeRO-3: all 2086 parameters may be live, and the bucket is as large as DeepSpeed makes it.
    assert gathered_bytes(units, Layout(engine="zero3", world_size=8)) == 2 * (2086 + 500_000_000)


def test_the_peak_is_where_it_is_most() -> None:
    units = (Unit(weights=(Weight(shape=(1000,), itemsize=4, is_trained=True),), is_root=True),)
    layout, how = Layout(engine="single", world_size=1), Trained(optim="adamw_torch")

    def peak(layer: float, **load: Any) -> tuple[str, float]:
        step = StepMemory(layer=layer, around=100, working=50)
        found = peak_of(units, layout, how, step, Load(num_layers=10, **load))
        return found.moment, found.total

    assert peak(1000) == ("backward, first layer", 12_000 + 10_100 + 50)
    assert peak(1000, accumulates=True, encoders=7) == ("backward, first layer", 16_000 + 10_100 + 50 + 7)
    assert peak(1) == ("optimizer step", 16_000 + 4_000)  # foreach: the root of every second moment
    assert peak(1, encoding=9_000) == ("encoding videos", 12_000 + 9_000)
    fused = Trained(optim="adamw_torch_fused")
    assert optimizer_step_bytes(units, layout, fused) == 0
    found = peak_of(units, layout, fused, StepMemory(layer=4_000, around=0, working=50), Load(num_layers=1))
    assert (found.moment, found.total) == ("backward, last layer", 16_000 + 4_000 + 50)


@pytest.mark.parametrize("optim", usable_optimizers("single"))
def test_state_bytes_are_those_of_the_optimizer(optim: str, tmp_path: Path) -> None:
    arguments = WanTrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, learning_rate=1e-3)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    for shape in ((64, 128), (100,), (512, 48)):
        parameter = torch.nn.Parameter(torch.ones(shape))
        parameter.grad = torch.ones(shape)
        optimizer = kind([parameter], **options)
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
            optimizer.step()
        assert state_bytes(optim, shape) == pytest.approx(_bytes(optimizer), abs=8), shape


def _bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    plain = [part for value in values if isinstance(value, torch.Tensor) for part in _parts(value)]
    return sum(part.numel() * part.element_size() for part in plain)


def _parts(tensor: Any) -> list[torch.Tensor]:
    """Of torchao's 8-bit tensors the codes and scales; the table of what codes mean is shared by all."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0] if name != "qmap"]


def test_the_default_optimizer_is_transformers(tmp_path: Path) -> None:
    assert WanTrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim == DEFAULT_OPTIM


def zero_bytes(base: str, output_dir: str) -> dict[str, int]:
    """What a DeepSpeed engine holds after a step."""
    trainer = small_trainer(base, output_dir, "zero3", max_steps=1, save_strategy="no", optim="adamw_torch")
    trainer.train()
    optimizer: Any = trainer.model_wrapped.optimizer

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    states = optimizer.optimizer.state.values()
    return {
        "parameters": size(p.ds_tensor for group in optimizer.fp16_groups for p in group),
        "gradients": size([optimizer.grad_partitions_flat_buffer]),
        "masters": size(optimizer.fp32_partitioned_groups_flat),
        "optimizer": size(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
        "bucket": size(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
    }


def test_zero3_holds_what_the_formula_says(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "t2v-1.3b")
    found = run_ranks(zero_bytes, 2, str(base), str(tmp_path / "run"), engine="zero3")[0]
    units = units_of_skeleton(VARIANTS["t2v-1.3b"], CheckpointReader(base), Techniques())
    layout = Layout(engine="zero3", world_size=2, is_mixed=False)
    fixed = fixed_bytes(units, layout, Trained(optim="adamw_torch"))
    assert {part: found[part] for part in ("parameters", "gradients", "optimizer")} == {
        "parameters": fixed.parameters, "gradients": fixed.gradients, "optimizer": fixed.optimizer,
    }  # fmt: skip
    assert found["masters"] == found["parameters"]  # fp32 parameters are their own masters: not counted twice
    assert found["bucket"] == 4 * layout.zero.reduce_bucket_size


def zero2_bytes(base: str, output_dir: str, engine: str) -> dict[str, Any]:
    """What a DeepSpeed engine holds after a step, its gradients at the end of the backward pass, and what it sent."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    gradients, original = [0], DeepSpeedEngine.step

    def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        averaged = engine.optimizer.averaged_gradients.values()
        gradients.append(size(tensor for group in averaged if group is not None for tensor in group))
        return original(engine, *args, **kwargs)

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    DeepSpeedEngine.step = step
    trainer = small_trainer(base, output_dir, engine, max_steps=1, save_strategy="no", optim="adamw_torch")
    with CountCollectives({}) as counted:
        trainer.train()
    optimizer: Any = trainer.model_wrapped.optimizer
    masters, states = optimizer.single_partition_of_fp32_groups, optimizer.optimizer.state.values()
    above = [*optimizer.param_buffer_of_bit16_for_cpu_offload_groups] if "offload" in engine else []
    return {
        "parameters": size(trainer.model.parameters()),
        "gradients": gradients[-1],
        "optimizer": size(masters) + size(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
        "on_host": size(master.grad for master in masters if master.grad is not None) + size(above),
        "sent": {
            kind: sum(one.bytes for one in counted.traffic if one.kind == kind) for kind in ("all-reduce", "all-gather")
        },
    }


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_zero2_holds_what_the_formula_says(offload: Offload, tmp_path: Path) -> None:
    """To 2%: DeepSpeed pads the two groups of parameters, and reduces norms besides."""
    base = write_checkpoint(tmp_path / "base", "t2v-1.3b")
    engine = "zero2" if offload == "none" else "zero2-offload"
    found = run_ranks(zero2_bytes, 2, str(base), str(tmp_path / "run"), engine, engine=engine)[0]
    units = units_of_skeleton(VARIANTS["t2v-1.3b"], CheckpointReader(base), Techniques())
    layout = Layout(engine="zero2", world_size=2, is_mixed=False, offload=offload)
    fixed = fixed_bytes(units, layout, Trained(optim="adamw_torch"))
    count = total(weight for unit in units for weight in unit.weights)
    assert (found["parameters"], fixed.parameters) == (4 * count, 4 * count)
    if offload == "none":
        assert (found["optimizer"], found["gradients"]) == pytest.approx((fixed.optimizer, fixed.gradients), rel=0.02)
    else:
        assert (fixed.optimizer, fixed.gradients, found["gradients"]) == (0, 0, 0)
        waiting = 4 * count // 2  # gradients of several micro-steps, of which this run has one
        assert found["optimizer"] + found["on_host"] + waiting == pytest.approx(fixed.host, rel=0.02)
    (reduced, gathered) = (one.bytes for one in micro_step_traffic(
        units, layout, VARIANTS["t2v-1.3b"].dit, num_samples=1, num_tokens=1, policy="none"
    ))  # fmt: skip
    assert found["sent"]["all-reduce"] == pytest.approx(reduced, rel=0.02)
    assert found["sent"]["all-gather"] == pytest.approx(gathered, rel=0.02)


def test_verdicts() -> None:
    assert parse_memory("80GiB") == 80 * GIB and parse_memory("141 GB") == 141e9
    assert parse_memory("512.5MiB") == 512.5 * 2**20
    with pytest.raises(ValueError, match="--gpu_memory 80: give a number and a unit, for instance 80GiB"):
        parse_memory("80")
    budget = Budget(memory=80 * GIB)
    assert budget.verdict(61.3 * GIB) == "fits: peak 61.3 of 80.0 GiB (reserve 6%)"
    assert budget.holds(75.1 * GIB) and not budget.holds(75.3 * GIB)
    assert budget.verdict(90 * GIB) == "does not fit: peak 90.0 of 80.0 GiB (reserve 6%)"
