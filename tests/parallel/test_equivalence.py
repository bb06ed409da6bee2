"""One training run on every layout: the same losses, gradients and weights as one process."""

import functools
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import layouts
from ranks import run_ranks
from synthetic import GLOBAL_BATCH, SyntheticSource, plan_for, tiny_denoiser

from wan_accel.lora import LoraSettings, initial_lora_value, inject_lora
from wan_accel.models.denoiser import WanDenoiser
from wan_accel.models.variants import VARIANTS
from wan_accel.parallel.mesh import ParallelDims

NUM_STEPS = 5
LORA = {"r": 4, "lora_alpha": 8.0}
# Of the step plan: the first step has samples of both buckets, fillers on two data ranks, and both kinds of ti2v's.
PLAN = {"seed": 22, "image_dropout": 0.3}
# With torch's 1e-8 a gradient that is nothing but rounding moves its weight by a part of a whole step.
ADAM_EPSILON = 1e-6


def train(variant: str, method: str, ulysses: int, output_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run `NUM_STEPS` optimizer steps; return losses, gradients after step 1, weights and local elements."""
    trainer = make_trainer(variant, method, ulysses, output_dir, options)
    gradients: dict[str, torch.Tensor] = {}
    record_gradients(trainer, gradients)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        "gradients": gradients,
        "weights": full_weights(trainer),
        "local_elements": local_elements(trainer),
        "searches": getattr(trainer.model_wrapped, "find_unused_parameters", None),
    }


def make_trainer(variant: str, method: str, ulysses: int, output_dir: str, options: dict[str, Any]) -> Any:
    """A `WanTrainer` of `tiny_model` on the ranks that `run_ranks` has started."""
    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.trainer import WanTrainer

    enable_fsdp_on_cpu()
    defaults: dict[str, Any] = {
        "max_steps": NUM_STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.01,
        "max_grad_norm": 0.5, "adam_epsilon": ADAM_EPSILON, "global_batch": GLOBAL_BATCH, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": not options["engine"].startswith("zero"),
        "ddp_backend": "gloo" if options["world_size"] > 1 else None,
    }  # fmt: skip
    arguments = defaults | options.get("arguments", {})
    args = WanTrainingArguments(output_dir=output_dir, ulysses=ulysses, **arguments)
    model, lora = tiny_model(variant, method)
    source = SyntheticSource(variant)
    sizes = {name: options[name] for name in ("micro_batch", "face_dropout") if name in options}
    plan = plan_for(source, **PLAN, **sizes)
    trainer = WanTrainer(model, args, source, plan, variant=VARIANTS[variant], lora=lora)
    run_blocks(trainer, options)
    return trainer


def tiny_model(variant: str, method: str) -> tuple[WanDenoiser, LoraSettings | None]:
    """The model that is trained, equal in every process."""
    model = tiny_denoiser(variant)
    if method == "full":
        return model, None
    lora = LoraSettings(**LORA)  # type: ignore[arg-type]
    inject_lora(model, lora, VARIANTS[variant])
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.data = initial_lora_value(name, tuple(parameter.shape), seed=3)
        elif ".lora_B." in name:
            # B starts at zero in training; here every adapter tensor must have a gradient from step 1.
            same = name.replace("lora_B", "lora_A")
            parameter.data = initial_lora_value(same, tuple(parameter.shape), seed=4)
    return model, lora


def train_all(
    cases: Sequence[tuple[str, str]], ulysses: int, output_dir: str, options: dict[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """`train` for each (variant, method) in turn, on the same ranks."""
    found = {}
    for variant, method in cases:
        try:
            found[variant, method] = train(variant, method, ulysses, f"{output_dir}/{variant}-{method}", options)
        except Exception as error:
            error.add_note(f"case: {variant}, {method}")
            raise
    return found


def run_layout(layout: layouts.Layout, output_dir: str) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """All cases on every rank of a layout; the ranks are started once for them."""
    arguments = (layouts.CASES, layout.ulysses, output_dir, layout.options)
    return run_ranks(train_all, layout.num_ranks, *arguments, engine=layout.engine, timeout_seconds=600)


def local_elements(trainer: Any) -> int:
    """Parameter elements that belong to this rank."""
    from wan_accel.parallel.fsdp import num_local_elements

    if trainer.engine == "zero3":  # small parameters are kept gathered besides
        return sum(parameter.ds_tensor.numel() for parameter in trainer.model.parameters())
    return num_local_elements(trainer.model)


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
            DeepSpeedEngine.step = original
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


# name: (engine, processes, ulysses)
LAYOUTS = {layout.name: (layout.engine, layout.num_ranks, layout.ulysses) for layout in layouts.LAYOUTS}
_SINGLE: dict[tuple[str, str], dict[str, Any]] = {}


def single(variant: str, method: str, folder: Path) -> dict[str, Any]:
    """The reference run, once for all layouts."""
    if (variant, method) not in _SINGLE:
        options = {"world_size": 1, "engine": "single"}
        _SINGLE[variant, method] = run_ranks(
            train, 1, variant, method, 1, str(folder), options, engine="single"
        )[0]
    return _SINGLE[variant, method]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[layouts.Layout], list[dict[Any, Any]]]:
    """`run_layout`, once for all cases of a layout."""

    @functools.lru_cache(maxsize=1)
    def run(layout: layouts.Layout) -> list[dict[Any, Any]]:
        return run_layout(layout, str(tmp_path_factory.mktemp(layout.name)))

    return run


@pytest.mark.parametrize(("variant", "method"), layouts.CASES)
@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=LAYOUTS)
def test_layouts_are_one_run(
    layout: layouts.Layout, variant: str, method: str, runs: Callable[..., Any], tmp_path: Path
) -> None:
    expected = single(variant, method, tmp_path)
    shapes = [tuple(weight.shape) for weight in expected["weights"].values()]
    for rank, results in enumerate(runs(layout)):
        result = results[variant, method]
        assert len(result["losses"]) == NUM_STEPS
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        assert_close_by_norm(result["gradients"], expected["gradients"], 1e-5)
        assert_close_by_norm(result["weights"], expected["weights"], 1e-5)
        assert result["local_elements"] == layout.elements(shapes, rank)


@pytest.mark.parametrize(("variant", "method"), layouts.CASES)
def test_every_parameter_is_compared(variant: str, method: str, tmp_path: Path) -> None:
    """Each trained parameter of the reference has a gradient that is not 0, and moves; a LoRA's base does neither."""
    expected = single(variant, method, tmp_path)
    start = dict(tiny_denoiser(variant).named_parameters())
    if method == "full":
        assert expected["gradients"].keys() == start.keys()
        assert not any(torch.equal(expected["weights"][name], value) for name, value in start.items())
    else:
        assert all(".lora_" in name for name in expected["gradients"])
        assert sum(".lora_" in name for name in expected["weights"]) == len(expected["gradients"]) > 0
    assert all(gradient.norm() > 0 for gradient in expected["gradients"].values())


def test_the_first_step_has_samples_of_every_kind() -> None:
    """What is said of `PLAN`: the gradients that are compared are sums in which all of this has a part."""
    step = plan_for(SyntheticSource("ti2v-5b"), **PLAN).step(0, 2)
    draws = [draw for micro in step.micro_steps for rank in micro.samples for draw in rank]
    assert len({micro.bucket for micro in step.micro_steps}) == 2
    assert {draw.weight for draw in draws} == {0, 1}
    assert {draw.drop_image for draw in draws if draw.weight} == {True, False}


@pytest.mark.parametrize(("engine", "ulysses"), product(layouts.ENGINES, layouts.DEGREES))
def test_nothing_is_left_out_without_its_reason(engine: str, ulysses: int) -> None:
    layout = layouts.Layout(engine=engine, ulysses=ulysses)
    replicas = layout.replicas if engine == "hsdp" else 1
    dims = ParallelDims(world_size=layouts.MAX_RANKS, ulysses=ulysses, dp_replicate=replicas)
    if layout in layouts.LAYOUTS:
        dims.validate(num_heads=8)
    else:
        with pytest.raises(ValueError, match=layouts.LEFT_OUT[engine, ulysses]):
            dims.validate(num_heads=8)


def assert_close_by_norm(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    for name, error in relative_errors(found, expected).items():
        assert error <= bound, f"{name}: {error}"


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each tensor's error relative to its norm, or to a hundredth of the largest norm if that is more."""
    assert found.keys() == expected.keys()
    largest = max(value.norm().item() for value in expected.values())
    return {
        name: (found[name] - value).norm().item() / max(value.norm().item(), 1e-2 * largest)
        for name, value in expected.items()
    }


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
