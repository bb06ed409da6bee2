"""Compiled blocks on several ranks: the run of one eager process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.test_equivalence import assert_close_by_norm, single, train
from ranks import run_ranks
from synthetic import tiny_denoiser

from wan_accel.assemble import Techniques, assemble
from wan_accel.lora import LoraSettings, inject_lora
from wan_accel.models.compilation import compile_blocks
from wan_accel.models.denoiser import inject_ulysses
from wan_accel.models.variants import VARIANTS
from wan_accel.parallel.engine import Engine
from wan_accel.parallel.mesh import ParallelDims

# Traces, differentiates and partitions like inductor, whose C++ would take a minute to build here.
BACKEND = "aot_eager_decomp_partition"


@pytest.mark.parametrize(
    ("engine", "ulysses", "variant", "method", "policy"),
    [
        ("fsdp2", 2, "animate-14b", "lora", "attention"),
        ("fsdp2", 1, "t2v-1.3b", "full", 0.5),
        ("ddp", 2, "t2v-1.3b", "full", "attention"),
        ("zero2", 1, "t2v-1.3b", "full", 0.5),
    ],
)
def test_compiled_ranks_are_one_eager_run(
    engine: str, ulysses: int, variant: str, method: str, policy: str | float, tmp_path: Path
) -> None:
    expected = single(variant, method, tmp_path / "single")
    options = {"world_size": 2, "engine": engine, "policy": policy, "backend": BACKEND}
    for result in run_ranks(train, 2, variant, method, ulysses, str(tmp_path / "run"), options, engine=engine):
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        assert_close_by_norm(result["gradients"], expected["gradients"], 1e-5)
        # AdamW makes much of rounding where a gradient is near 0.
        assert_close_by_norm(result["weights"], expected["weights"], 5e-5)


def step_compiled_pair() -> list[str | None]:
    """A LoRA on both experts of a pair, compiled for two shapes, on rank 0 of 4 whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    variant, dims = VARIANTS["t2v-a14b"], ParallelDims(world_size=4, ulysses=2)
    experts = []
    for _ in variant.experts:
        model = inject_lora(tiny_denoiser(variant.name), LoraSettings(r=2, lora_alpha=2.0), variant)
        group = dims.ulysses_group("cpu")
        assert group is not None
        compile_blocks(inject_ulysses(model, group), num_shapes=2, backend=BACKEND)
        experts.append(model)
    for frames in (1, 2):
        for model in experts:
            model(torch.randn(1, 16, frames, 4, 6), torch.rand(1), torch.randn(1, 5, 24)).sum().backward()
    return [model.sequence_parallel and model.sequence_parallel.group_name for model in experts]


def test_the_experts_of_a_pair_share_group_and_graphs() -> None:
    """Two groups would be two constants: the second shape would go beyond the number of graphs."""
    (names,) = run_ranks(step_compiled_pair, 1, engine="single")
    assert names[0] is not None and names[0] == names[1]


@pytest.mark.parametrize(
    ("engine", "techniques", "message"),
    [
        ("zero3", Techniques(compile=True), "compile: true does not work under ZeRO-3.*use FSDP2"),
        ("single", Techniques(fp8=True), "fp8=True needs memory.compile"),
        ("fsdp2", Techniques(activation_checkpointing=0.5), r"activation_checkpointing=0\.5 needs memory\.compile"),
    ],
)
def test_assembling_without_a_recipe_refuses_what_check_does(
    engine: Engine, techniques: Techniques, message: str
) -> None:
    unread: Any = None
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=message):
        assemble(
            VARIANTS["t2v-1.3b"], unread, techniques, engine=engine, dims=ParallelDims(world_size=2), device=device
        )
