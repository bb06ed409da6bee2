"""Compiled blocks on several ranks: the run of one eager process."""

from pathlib import Path

import pytest
import torch
from parallel.test_equivalence import assert_close_by_norm, single, train
from ranks import run_ranks

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
