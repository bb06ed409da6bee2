"""Weak and strong scaling of a training step over 1..N GPUs: `python benchmarks/scaling.py --gpus 1 2 4 8`.

Launches the real trainer on random weights once a point (`accelerate launch`), and prints a table against one GPU:
weak scaling (as many samples a GPU as one has) by tokens a second and GPU, strong scaling (as many samples in all) by
seconds a step. On many machines, launch every point by hand with `--measure` and print the rows of `--out` with
`--report`. Without GPUs it runs tiny slices on gloo, to show that it works, and claims nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="t2v-a14b", choices=["t2v-a14b", "ti2v-5b"])
    parser.add_argument("--method", default="full", choices=["lora", "full"])
    parser.add_argument("--modes", nargs="+", default=["weak", "strong"], choices=["weak", "strong"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--ulysses", type=int, default=1, help="of every point that has as many GPUs")
    parser.add_argument("--samples", type=int, default=8, help="of a step: a GPU (weak), of all GPUs (strong)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--config_file", type=Path, default=ROOT / "recipes/accelerate/fsdp2.yaml")
    parser.add_argument("--out", type=Path, default=Path("scaling.jsonl"), help="rows are appended to it")
    parser.add_argument("--measure", choices=["weak", "strong"], help="be a rank of one point that was launched")
    parser.add_argument("--report", action="store_true", help="print the rows of --out and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.measure:
        from scaling_step import measure, write

        options.mode = options.measure
        row = measure(options)
        if int(os.environ.get("RANK", "0")) == 0:
            write(row, options.out)
        return 0
    if not options.report:
        for mode in options.modes:
            for gpus in options.gpus:
                launch(options, mode, gpus)
    print("\n".join(report([json.loads(line) for line in options.out.read_text().splitlines()])))
    return 0


def launch(options: argparse.Namespace, mode: str, gpus: int) -> None:
    """Measure one point; what the launch prints is shown if it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", options.config_file,
        "--num_processes", gpus, __file__, "--measure", mode, "--variant", options.variant, "--method", options.method,
        "--ulysses", options.ulysses if gpus % options.ulysses == 0 else 1, "--samples", options.samples,
        "--steps", options.steps, "--out", options.out.resolve(),
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode} scaling on {gpus} GPUs failed:\n{done.stderr[-3000:]}")


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table; efficiency against the row of the same mode on the fewest GPUs."""
    lines = [] if any(row["device"] != "cpu" for row in rows) else ["no GPU: to show that it runs; nothing is claimed"]
    lines += [
        "| mode | engine | GPUs | ulysses | samples | s a step | tokens/s | efficiency | communication |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["gpus"])
        for row in own:
            lines.append(
                f"| {mode} | {row['engine']} | {row['gpus']} | {row['ulysses']} | {row['samples']} | "
                f"{row['seconds']:.3f} | {row['tokens_per_second']:.0f} | {efficiency(row, own[0]):.2f} | "
                f"{row['communication']:.2f} |"
            )
    return lines


def efficiency(row: dict[str, Any], first: dict[str, Any]) -> float:
    """Tokens a second and GPU over those of `first`; 1 is perfect, weak or strong."""
    return (row["tokens_per_second"] / row["gpus"]) / (first["tokens_per_second"] / first["gpus"])


if __name__ == "__main__":
    sys.exit(main())
