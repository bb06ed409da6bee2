"""Print how far each layout of the equivalence test is from one process: `python benchmarks/equivalence.py`."""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]

from layouts import CASES, DEGREES, ENGINES, LEFT_OUT, Layout  # noqa: E402  (found through the path set above)
from test_equivalence import NUM_STEPS, relative_errors, run_layout, single  # noqa: E402


def row(layout: Layout, case: tuple[str, str], found: list[dict[str, Any]], expected: dict[str, Any]) -> str:
    """One line of the table: the largest differences of any rank, and each rank's share of the parameters."""
    losses = max(abs(a - b) / b for one in found for a, b in zip(one["losses"], expected["losses"], strict=True))
    errors = {
        name: max(max(relative_errors(one[name], expected[name]).values()) for one in found)
        for name in ("gradients", "weights")
    }
    whole = sum(weight.numel() for weight in expected["weights"].values())
    shares = sorted({f"{one['local_elements'] / whole:.3f}" for one in found})
    return (
        f"| {layout.name} | {', '.join(case)} | {losses:.1e} | {errors['gradients']:.1e} | {errors['weights']:.1e} | "
        f"{' to '.join({shares[0]: None, shares[-1]: None})} |"
    )


HEAD = f"""\
| layout | variant, method | losses of {NUM_STEPS} steps | gradients of step 1 | weights | elements a rank |
|---|---|---|---|---|---|"""


def rows(folder: Path) -> Iterator[str]:
    expected = {case: single(*case, folder) for case in CASES}
    for engine, ulysses in product(ENGINES, DEGREES):
        layout = Layout(engine=engine, ulysses=ulysses)
        if (engine, ulysses) in LEFT_OUT:
            yield f"| {layout.name} | left out | {LEFT_OUT[engine, ulysses]} | | | |"
            continue
        ranks = run_layout(layout, str(folder))
        for case in CASES:
            yield row(layout, case, [results[case] for results in ranks], expected[case])


def main() -> None:
    table = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the ranks print goes to stderr
    print(HEAD, file=table)
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(Path(folder)):
            print(line, file=table, flush=True)


if __name__ == "__main__":
    main()
