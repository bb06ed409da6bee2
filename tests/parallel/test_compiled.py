"""Compiled blocks on several ranks: the run of one eager process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.test_equivalence import assert_close_by_norm, single, train
from ranks import run_ranks

from wan_accel.assemble import Techniques, assemble
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


@pytest.mark.parametrize(
    ("engine", "techniques", "message"),
    [
        ("zero3", Techniques(compile=True), "compile=True does not work under ZeRO-3.*use FSDP2, or compile=False"),
        ("fsdp2", Techniques(activation_checkpointing=0.5), r"activation_checkpointing=0\.5 needs compile=True"),
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
