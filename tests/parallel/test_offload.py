"""ZeRO-2, and engines that keep state in host memory: the run of one process, and what is refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from parallel.test_equivalence import assert_close_by_norm, single, train
from ranks import LAUNCH_ENV, ON_HOST, run_ranks
from small_run import full_weights, logged, small_trainer

from wan_accel import checkpoint
from wan_accel.optimizers import optimizer_problem, usable_optimizers
from wan_accel.parallel.engine import launched_engine
from wan_accel.parallel.names import zero_offload

AVERAGED = {"ema_decay": 0.5}
Run = tuple[list[float], dict[str, torch.Tensor]]

LAYOUTS = {
    # name: (engine, ranks, ulysses)
    "zero2": ("zero2", 2, 1),
    "zero2-ulysses-2": ("zero2", 2, 2),
    "zero2-offload": ("zero2-offload", 2, 1),
    "zero3-offload": ("zero3-offload", 2, 1),
    "fsdp2-offload": ("fsdp2-offload", 2, 1),
    "fsdp2-offload-ulysses-2": ("fsdp2-offload", 2, 2),
    "hsdp-offload-ulysses-2": ("hsdp-offload", 4, 2),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_run(layout: str, method: str, tmp_path: Path) -> None:
    engine, ranks, ulysses = LAYOUTS[layout]
    expected = single("t2v-1.3b", method, tmp_path / "single")
    options = {"world_size": ranks, "engine": engine}
    results = run_ranks(train, ranks, "t2v-1.3b", method, ulysses, str(tmp_path / "run"), options, engine=engine)
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        assert result["gradients"].keys() == expected["gradients"].keys()
        assert_close_by_norm(result["gradients"], expected["gradients"], 1e-5)
        assert_close_by_norm(result["weights"], expected["weights"], 1e-5)


def run(base: str, output_dir: str, engine: str, arguments: dict[str, Any], resume: str | None = None) -> Run:
    """Losses and trained weights of four steps over an assembled model, its checkpoints at 2 and 4."""
    trainer = small_trainer(base, output_dir, engine, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return logged(trainer, "loss"), full_weights(trainer)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b"))


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Where one process ran, and what it says."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_ranks(run, 1, base, str(folder), "single", AVERAGED, engine="single")[0]


@pytest.mark.parametrize("engine", ["fsdp2-offload", "zero2-offload"])
def test_resumed_equals_uninterrupted_average_included(
    engine: str, base: str, alone: tuple[Path, Run], tmp_path: Path
) -> None:
    """Bit for bit under FSDP2; and both, from the same weights, are the run of one process.

    DeepSpeed's AdamW for the CPU makes its bias corrections of the last step's, and after a resume by a power
    (0.19, csrc/includes/cpu_adam.h): they differ by rounding.
    """
    near = 0.0 if engine == "fsdp2-offload" else 1e-5
    folder, (losses, weights) = alone
    whole = run_ranks(run, 2, base, str(tmp_path / "a"), engine, AVERAGED, engine=engine)[0]
    assert whole[0] == pytest.approx(losses, rel=1e-5)
    assert_close_by_norm(whole[1], weights, 1e-5)
    resume = str(tmp_path / "a" / "checkpoint-2")
    again = run_ranks(run, 2, base, str(tmp_path / "b"), engine, AVERAGED, resume, engine=engine)[0]
    assert again[0] == pytest.approx(whole[0], rel=near, abs=0)
    for ema in (False, True):
        of_one, of_whole, of_again = (
            checkpoint.read_trained(path / "checkpoint-4", ema=ema) for path in (folder, tmp_path / "a", tmp_path / "b")
        )
        assert of_whole.keys() == of_again.keys() == of_one.keys()
        assert_close_by_norm(of_again, of_whole, near)
        assert_close_by_norm(of_whole, of_one, 1e-5)


def placed(base: str, output_dir: str) -> list[str]:
    """Devices and policies of FSDP2's offloading, of a model that is assembled and of one that the trainer shards."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

    trainer = small_trainer(base, output_dir, "fsdp2-offload")
    modules = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules if (group := module._get_fsdp_state()._fsdp_param_group) is not None]
    assert len(groups) == len(modules) > 1
    assert all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)
    return sorted({parameter.device.type for parameter in trainer.model.parameters()})


def test_every_unit_is_offloaded(base: str, tmp_path: Path) -> None:
    assert run_ranks(placed, 2, base, str(tmp_path), engine="fsdp2-offload") == [["cpu"], ["cpu"]]


def test_one_process_shards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCH_ENV["fsdp2-offload"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="fsdp_offload_params: true needs two processes or more"):
        launched_engine()


def masters(base: str, output_dir: str) -> dict[str, Any]:
    """What a bf16 run trains: its forward weights and their masters."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # which it asks for where there is DeepSpeed
    trainer = small_trainer(base, output_dir, "zero2", bf16=True, max_steps=2)
    trainer.train()
    return {
        "forward": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "masters": full_weights(trainer),
        "losses": logged(trainer, "loss"),
    }


def test_zero2_keeps_fp32_masters(base: str, alone: tuple[Path, Run], tmp_path: Path) -> None:
    found = run_ranks(masters, 2, base, str(tmp_path), engine="zero2-bf16")[0]
    stored = checkpoint.read_trained(tmp_path / "checkpoint-2")
    assert stored.keys() == found["masters"].keys()
    for name, master in found["masters"].items():
        assert (master.dtype, found["forward"][name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.to(torch.bfloat16), found["forward"][name])
        assert torch.equal(master, stored[name]), name
    assert any(not torch.equal(master, master.bfloat16().float()) for master in found["masters"].values())
    assert found["losses"] == pytest.approx(alone[1][0][:2], rel=2e-2)


def test_a_zero2_checkpoint_stays_on_its_layout(base: str, tmp_path: Path) -> None:
    run_ranks(run, 2, base, str(tmp_path / "a"), "zero2", {"max_steps": 2}, engine="zero2")
    resume = str(tmp_path / "a" / "checkpoint-2")
    # The weights of the forward pass lie beside masters and moments, which check_space asks for.
    count = sum(tensor.numel() for tensor in checkpoint.read_trained(Path(resume)).values())
    size = sum(file.stat().st_size for file in (Path(resume) / "zero").rglob("*.pt"))
    assert size == pytest.approx((4 + 4 + 8) * count, rel=0.02)
    trained = {"weights": [(1 + shutil.disk_usage(tmp_path).free) // 14]}
    checkpoint.check_space(tmp_path, trained, optim="adamw_torch", engine="zero3")
    with pytest.raises(checkpoint.NoSpaceError):
        checkpoint.check_space(tmp_path, trained, optim="adamw_torch", engine="zero2")
    with pytest.raises(RuntimeError, match="written by 2 zero2 processes and cannot be resumed on 1"):
        run_ranks(run, 1, base, str(tmp_path / "b"), "zero2", {}, resume, engine="zero2")
    for engine in ("zero3", "fsdp2"):
        with pytest.raises(RuntimeError, match=f"written by zero2 and cannot be resumed with {engine}"):
            run_ranks(run, 2, base, str(tmp_path / "c"), engine, {}, resume, engine=engine)


def refused(base: str, output_dir: str, engine: str, environment: dict[str, str], arguments: dict[str, Any]) -> str:
    os.environ.update(environment)
    with pytest.raises(ValueError) as error:
        small_trainer(base, output_dir, engine, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("engine", "environment", "arguments", "message"),
    [
        ("zero2-offload", {}, {"optim": "sgd"}, "optim=sgd cannot be used with zero2 and offloading"),
        ("zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, {}, "zero_stage=1 is not supported: use 2 or 3"),
        ("zero2", {ON_HOST["param"]: "cpu"}, {}, "offload_param_device=cpu has no effect under ZeRO-2"),
        ("zero3", {ON_HOST["optimizer"]: "nvme"}, {}, "offload_optimizer_device=nvme is not "),
    ],
)
def test_what_is_refused(
    engine: str, environment: dict[str, str], arguments: dict[str, Any], message: str, base: str, tmp_path: Path
) -> None:
    assert message in run_ranks(refused, 1, base, str(tmp_path), engine, environment, arguments, engine=engine)[0]


def test_only_adamw_is_offloaded_by_zero() -> None:
    for engine in ("zero2", "zero3"):
        assert usable_optimizers(engine, "optimizer") == ["adamw_torch", "adamw_torch_fused"]
    assert optimizer_problem("sgd", "fsdp2", "parameters") is None
    assert optimizer_problem("sgd", "zero3", "optimizer") == (
        "training.optim=sgd cannot be used with zero3 and offloading: accelerate would put DeepSpeed's AdamW for the "
        "CPU in its place; use adamw_torch, adamw_torch_fused"
    )
    with pytest.raises(ValueError, match="offload_param_device=cpu without the optimizer is not supported"):
        zero_offload("zero3", optimizer="none", param="cpu")
