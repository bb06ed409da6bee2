"""accelerate's plugins in a loop of the user's own: sharded like training's, and equal to one process."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched_env
from ranks import LAUNCH_ENV, run_ranks
from synthetic import tiny_denoiser

from wan_accel.tiny import init_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    init_tiny("t2v-1.3b", folder)
    return str(folder)


def run_example(*arguments: str) -> list[float]:
    path = ROOT / "examples" / "accelerate_loop.py"
    spec = importlib.util.spec_from_file_location("accelerate_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> list[float]:
    return run_ranks(run_example, 1, "--checkpoint", checkpoint, engine="single")[0]


@pytest.mark.parametrize(
    ("engine", "config", "processes", "ulysses"),
    [
        ("fsdp2", "cpu_fsdp2", 2, 2),
        ("fsdp2", "cpu_ddp", 2, 1),  # no engine in the launcher's config: the shipped one's
        ("fsdp2", "hsdp", 4, 2),
        ("zero3", "cpu_zero3", 2, 2),
        ("zero3", "cpu_zero3", 2, 1),
    ],
)
def test_the_example_equals_one_process(
    engine: str, config: str, processes: int, ulysses: int, checkpoint: str, alone: list[float]
) -> None:
    """As `accelerate launch` starts it; four processes on two machines, as far as they are told."""
    path = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    env = launched_env(path, "--mixed_precision", "no", processes=processes) | {"LOCAL_WORLD_SIZE": "2"}
    arguments = ["--checkpoint", checkpoint, "--engine", engine, "--ulysses", str(ulysses)]
    for losses in run_ranks(run_example, processes, *arguments, env=env):
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=0)


def inputs(variant: str) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """One batch of every condition, the same on all ranks."""
    draw = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    conditions = {}
    if variant == "animate-14b":
        conditions = {
            "condition": rand(1, 20, 3, 4, 6), "clip_features": rand(1, 257, 40), "pose_latents": rand(1, 16, 2, 4, 6),
            "motion_vectors": rand(1, 5, 16),
        }  # fmt: skip
    return (rand(1, 16, 3, 4, 6), torch.tensor([437.0]), rand(1, 5, 24)), conditions


def gradients_of(model: torch.nn.Module, variant: str) -> dict[str, torch.Tensor]:
    batch, conditions = inputs(variant)
    model(*batch, **conditions).square().mean().backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in whole.items() if g is not None}


def prepared(variant: str, precision: str) -> dict[str, Any]:
    """A denoiser that accelerate has sharded, and one that `fully_shard_denoiser` has, with the same plugin."""
    from accelerate import Accelerator
    from launched import fsdp_units

    from wan_accel import fsdp2_plugin
    from wan_accel.parallel.fsdp import fully_shard_denoiser
    from wan_accel.parallel.mesh import ParallelDims

    plugin = fsdp2_plugin(variant)
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision=precision)
    model, sharded = tiny_denoiser(variant), tiny_denoiser(variant)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    fully_shard_denoiser(sharded, plugin, ParallelDims(world_size=2).shard_mesh("cpu"))
    result: dict[str, Any] = {"theirs": gradients_of(model, variant), "ours": gradients_of(sharded, variant)}
    result |= {"their units": fsdp_units(model), "our units": fsdp_units(sharded)}
    before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    result["moved"] = {name: before[name] - p.detach().full_tensor() for name, p in model.named_parameters()}
    return result


@pytest.mark.parametrize(("variant", "precision"), [("animate-14b", "no"), ("animate-14b", "bf16"), ("t2v-1.3b", "no")])
def test_accelerate_shards_as_training_does(variant: str, precision: str) -> None:
    expected = gradients_of(tiny_denoiser(variant), variant)
    for result in run_ranks(prepared, 2, variant, precision, engine="fsdp2"):
        theirs, ours = result["their units"], result["our units"]
        assert theirs.keys() == ours.keys() and len(theirs) == (3 if variant == "t2v-1.3b" else 10)
        # accelerate leaves the root gathered between forward and backward, whatever the config says.
        assert (theirs[""].pop("reshards"), ours[""].pop("reshards")) == (False, True)
        assert theirs == ours
        assert {unit["reduce_dtype"] for unit in ours.values()} == {None if precision == "no" else torch.float32}
        for name, gradient in result["theirs"].items():
            assert torch.equal(gradient, result["ours"][name]), name
            torch.testing.assert_close(result["moved"][name], gradient, rtol=0, atol=1e-6)  # SGD, learning rate 1
            bound = 1e-6 if precision == "no" else 0.1  # bf16 rounds through six blocks
            assert (gradient - expected[name]).norm() <= bound * (expected[name].norm() + 1e-3), name
        assert result["theirs"].keys() == expected.keys()


def zero_clipping(max_grad_norm: float) -> tuple[float, int]:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from wan_accel import zero3_plugin

    plugin = zero3_plugin("t2v-1.3b", max_grad_norm=max_grad_norm)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = tiny_denoiser("t2v-1.3b")
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return engine.gradient_clipping(), engine.zero_optimization_stage()


@pytest.mark.parametrize(("clipping", "launched", "expected"), [(0.0, None, 0.0), (0.5, None, 0.5), (0.5, "2.0", 2.0)])
def test_zero_clips_only_where_it_is_asked_to(clipping: float, launched: str | None, expected: float) -> None:
    """accelerate and DeepSpeed clip to 1.0 where nothing is said."""
    env = dict(LAUNCH_ENV["zero3"]) | ({} if launched is None else {"ACCELERATE_GRADIENT_CLIPPING": launched})
    assert run_ranks(zero_clipping, 1, clipping, env=env) == [(expected, 3)]


def test_what_the_plugins_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_accel import fsdp2_plugin, zero3_plugin

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as fsdp2_plugin does: to be taken back
    with pytest.raises(ValueError, match=r"variant 't2v-1\.4b' is not known"):
        fsdp2_plugin("t2v-1.4b")
    for name, value in LAUNCH_ENV["fsdp2"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="zero3_plugin: this job was launched with another engine"):
        zero3_plugin("t2v-1.3b")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")  # of accelerator.save_state, which is the user's
    assert fsdp2_plugin("t2v-1.3b").state_dict_type.name == "FULL_STATE_DICT"
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match=r"parallelism_config_cp_size=2 is not honoured here: .*inject_ulysses"):
        fsdp2_plugin("t2v-1.3b")
