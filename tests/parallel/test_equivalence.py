"""One training run on every layout: the same losses, gradients and weights as one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from synthetic import GLOBAL_BATCH, SyntheticSource, plan_for, tiny_denoiser

NUM_STEPS = 5
LORA = {"r": 4, "lora_alpha": 8.0}


def train(
    variant: str, method: str, ulysses: int, output_dir: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Run `NUM_STEPS` optimizer steps; return losses, gradients after step 1, weights and local elements."""
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.lora import LoraSettings, initial_lora_value, inject_lora, is_lora
    from wan_accel.models.variants import VARIANTS
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.parallel.fsdp import num_local_elements
    from wan_accel.trainer import WanTrainer

    enable_fsdp_on_cpu()
    args = WanTrainingArguments(
        output_dir=output_dir, max_steps=NUM_STEPS, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        use_cpu=not options["engine"].startswith("zero"), ddp_backend="gloo" if options["world_size"] > 1 else None,
        lr_scheduler_type="constant", global_batch=GLOBAL_BATCH, ulysses=ulysses, weight_decay=0.01,
        disable_tqdm=True, max_grad_norm=0.5, **options.get("arguments", {}),
    )  # fmt: skip
    row = VARIANTS[variant]
    model = tiny_denoiser(variant)
    lora = None
    if method == "lora":
        lora = LoraSettings(**LORA)
        inject_lora(model, lora, row)
        for name, parameter in model.named_parameters():
            if is_lora(name):
                value = initial_lora_value(name, tuple(parameter.shape), seed=3)
                # B starts at zero in training; here every adapter tensor must have a gradient from step 1.
                parameter.data = value if ".lora_A." in name else initial_lora_value(
                    name.replace("lora_B", "lora_A"), tuple(parameter.shape), seed=4
                )  # fmt: skip
    source = SyntheticSource(variant)
    trainer = WanTrainer(
        model,
        args,
        source,
        plan_for(source, micro_batch=options.get("micro_batch", 1), face_dropout=options.get("face_dropout", 0.0)),
        variant=row,
        lora=lora,
    )
    run_blocks(trainer, options)
    gradients: dict[str, torch.Tensor] = {}
    record_gradients(trainer, gradients)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        "gradients": gradients,
        "weights": full_weights(trainer),
        "local_elements": num_local_elements(trainer.model),
        "searches": getattr(trainer.model_wrapped, "find_unused_parameters", None),
    }


def run_blocks(trainer: Any, options: dict[str, Any]) -> None:
    """Apply `policy` (of recomputation) and `backend` (of compilation) to the blocks."""
    from wan_accel.models.blocks import CheckpointedModule
    from wan_accel.models.compilation import compile_blocks
    from wan_accel.models.recompute import recompute_of

    recompute = recompute_of(options.get("policy", "none"))
    for module in trainer.model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpointing, module.contexts = recompute.checkpointing, recompute.contexts
    if "backend" in options:
        shapes, backend = trainer.plan.num_shapes, options["backend"]
        compile_blocks(trainer.model, num_shapes=shapes, budget=recompute.budget, backend=backend)


def record_gradients(trainer: Any, gradients: dict[str, torch.Tensor]) -> None:
    """Keep every gradient of the first step, whole and before clipping."""
    if trainer.engine.startswith("zero"):
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.utils import safe_get_full_grad

        original = DeepSpeedEngine.step

        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if not gradients:
                for name, parameter in engine.module.named_parameters():
                    if parameter.requires_grad:
                        gradients[name] = safe_get_full_grad(parameter).clone()
            return original(engine, *args, **kwargs)

        DeepSpeedEngine.step = step
        return
    clip = trainer._clip_grad_norm

    def record(model: torch.nn.Module) -> Any:
        if not gradients:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    grad = parameter.grad
                    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                    gradients[name.removeprefix("module.")] = grad.clone()
        return clip(model)

    trainer._clip_grad_norm = record


def full_weights(trainer: Any) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if trainer.engine == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.data.clone()
        else:
            data = parameter.data
            weights[name] = (data.full_tensor() if hasattr(data, "full_tensor") else data).clone()
    return weights


LAYOUTS = {
    # name: (engine, processes, ulysses)
    "ddp-2": ("ddp", 2, 1),
    "fsdp2-2": ("fsdp2", 2, 1),
    "zero3-2": ("zero3", 2, 1),
    "ddp-2-ulysses-2": ("ddp", 2, 2),
    "fsdp2-2-ulysses-2": ("fsdp2", 2, 2),
    "zero3-2-ulysses-2": ("zero3", 2, 2),
    "fsdp2-4-ulysses-2": ("fsdp2", 4, 2),
    "hsdp-2x2-ulysses-2": ("hsdp", 4, 2),
}
POLICIES = {"fsdp2-4-ulysses-2": "full", "zero3-2-ulysses-2": "attention", "hsdp-2x2-ulysses-2": "attention"}
_SINGLE: dict[tuple[str, str], dict[str, Any]] = {}


def single(variant: str, method: str, folder: Path) -> dict[str, Any]:
    """The reference run, once for all layouts."""
    if (variant, method) not in _SINGLE:
        options = {"world_size": 1, "engine": "single"}
        _SINGLE[variant, method] = run_ranks(
            train, 1, variant, method, 1, str(folder), options, engine="single"
        )[0]
    return _SINGLE[variant, method]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("variant", "method"), [("animate-14b", "full"), ("animate-14b", "lora"), ("t2v-1.3b", "full")]
)
def test_layouts_are_one_run(variant: str, method: str, layout: str, tmp_path: Path) -> None:
    engine, world_size, ulysses = LAYOUTS[layout]
    expected = single(variant, method, tmp_path / "single")
    options = {"world_size": world_size, "engine": engine, "policy": POLICIES.get(layout, "none")}
    results = run_ranks(
        train, world_size, variant, method, ulysses, str(tmp_path / "run"), options, engine=engine
    )
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        assert result["gradients"].keys() == expected["gradients"].keys()
        assert_close_by_norm(result["gradients"], expected["gradients"], 1e-5)
        assert_close_by_norm(result["weights"], expected["weights"], 1e-5)
    if engine in ("fsdp2", "hsdp"):
        whole = sum(weight.numel() for weight in expected["weights"].values())
        shards = 2 if engine == "hsdp" else world_size
        assert max(result["local_elements"] for result in results) <= 1.1 * whole / shards
        assert sum(result["local_elements"] for result in results) == whole * world_size // shards


def assert_close_by_norm(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float
) -> None:
    largest = max(value.norm().item() for value in expected.values())
    for name, value in found.items():
        error = (value - expected[name]).norm().item()
        assert error <= bound * max(expected[name].norm().item(), 1e-2 * largest), f"{name}: {error}"


def test_micro_batch_does_not_change_the_run(tmp_path: Path) -> None:
    options = {"world_size": 1, "engine": "single", "micro_batch": 4, "policy": "full"}
    result = run_ranks(train, 1, "t2v-1.3b", "full", 1, str(tmp_path), options, engine="single")[0]
    expected = single("t2v-1.3b", "full", tmp_path / "single")
    torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    assert_close_by_norm(result["weights"], expected["weights"], 1e-5)


def test_ddp_trains_everything_without_a_search_where_every_face_is_dropped(tmp_path: Path) -> None:
    options = {"world_size": 2, "engine": "ddp", "face_dropout": 1.0}
    for result in run_ranks(train, 2, "animate-14b", "full", 1, str(tmp_path), options, engine="ddp"):
        assert result["searches"] is False
        trained = {name for name, _ in tiny_denoiser("animate-14b").named_parameters()}
        assert result["gradients"].keys() == trained
        assert all(gradient.norm() > 0 for name, gradient in result["gradients"].items() if "face_" in name)
        assert len(result["losses"]) == NUM_STEPS


def test_bf16_computes_in_bf16_and_keeps_fp32_masters(tmp_path: Path) -> None:
    options = {"world_size": 2, "engine": "fsdp2"}
    results = run_ranks(train, 2, "animate-14b", "full", 1, str(tmp_path), options, engine="fsdp2-bf16")
    expected = single("animate-14b", "full", tmp_path / "single")
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-2)
        assert result["losses"] != pytest.approx(expected["losses"], rel=1e-5)
        assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
        assert {gradient.dtype for gradient in result["gradients"].values()} == {torch.float32}
