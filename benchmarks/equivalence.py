"""Print how far each layout of the equivalence test is from one process: `python benchmarks/equivalence.py`."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "parallel")]

from ranks import run_ranks  # noqa: E402  (found through the path set above)
from test_equivalence import LAYOUTS, NUM_STEPS, train  # noqa: E402

CASES = [("animate-14b", "full"), ("animate-14b", "lora"), ("t2v-1.3b", "full")]


def worst(found: dict, expected: dict) -> float:
    """The largest error of a tensor relative to its norm, or to a hundredth of the largest norm if that is more."""
    largest = max(value.norm().item() for value in expected.values())
    return max(
        (found[name] - value).norm().item() / max(value.norm().item(), 1e-2 * largest)
        for name, value in expected.items()
    )


def main() -> None:
    print(
        f"| variant, method | layout | losses of {NUM_STEPS} steps | gradients of step 1 | weights | elements a rank |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for variant, method in CASES:
            options = {"world_size": 1, "engine": "single"}
            expected = run_ranks(train, 1, variant, method, 1, folder, options, engine="single")[0]
            whole = sum(weight.numel() for weight in expected["weights"].values())
            for name, (engine, size, ulysses) in LAYOUTS.items():
                options = {"world_size": size, "engine": engine}
                found = run_ranks(train, size, variant, method, ulysses, folder, options, engine=engine)[0]
                losses = max(abs(a - b) / b for a, b in zip(found["losses"], expected["losses"]))
                gradients = worst(found["gradients"], expected["gradients"])
                weights = worst(found["weights"], expected["weights"])
                share = "partitioned" if engine == "zero3" else f"{found['local_elements'] / whole:.2f}"
                print(f"| {variant} {method} | {name} | {losses:.1e} | {gradients:.1e} | {weights:.1e} | {share} |")


if __name__ == "__main__":
    main()
