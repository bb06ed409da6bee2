"""ZeRO-2, and engines that keep state in host memory: the run of one process, and what is refused."""

from pathlib import Path

import pytest
import torch
from parallel.test_equivalence import assert_close_by_norm, single, train
from ranks import run_ranks

LAYOUTS = {
    # name: (engine, ulysses)
    "zero2": ("zero2", 1),
    "zero2-ulysses-2": ("zero2", 2),
    "zero2-offload": ("zero2-offload", 1),
    "zero3-offload": ("zero3-offload", 1),
    "fsdp2-offload": ("fsdp2-offload", 1),
    "fsdp2-offload-ulysses-2": ("fsdp2-offload", 2),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_run(layout: str, method: str, tmp_path: Path) -> None:
    engine, ulysses = LAYOUTS[layout]
    expected = single("t2v-1.3b", method, tmp_path / "single")
    options = {"world_size": 2, "engine": engine}
    results = run_ranks(train, 2, "t2v-1.3b", method, ulysses, str(tmp_path / "run"), options, engine=engine)
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        assert result["gradients"].keys() == expected["gradients"].keys()
        assert_close_by_norm(result["gradients"], expected["gradients"], 1e-5)
        assert_close_by_norm(result["weights"], expected["weights"], 1e-5)
