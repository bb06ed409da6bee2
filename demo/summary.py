"""Print what `make demo` made, how long it took and what was learnt; fail if the figures are not reached."""

import json
import sys
from pathlib import Path

# What each run has to reach: loss after / loss before, and loss after / loss of predicting zero.
LIMITS = {"lora": (0.95, None), "full": (0.7, 0.7)}
RELOAD_TOLERANCE = 1e-5


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def judge(name: str, folder: Path) -> tuple[str, bool]:
    """One line of figures for a run, and whether they are reached."""
    evaluated = evaluations(folder / name)
    first, last = evaluated[0], evaluated[-1]
    reloaded = json.loads((folder / f"reloaded-{name}.json").read_text())["eval_loss"]
    ratio, to_zero = last["eval_loss"] / first["eval_loss"], last["eval_loss"] / last["eval_zero_loss"]
    difference = abs(reloaded - last["eval_loss"]) / last["eval_loss"]
    start_limit, zero_limit = LIMITS[name]
    good = ratio <= start_limit and difference <= RELOAD_TOLERANCE and (zero_limit is None or to_zero <= zero_limit)
    wanted = f"<= {start_limit}" + (f" and <= {zero_limit} x predicting zero" if zero_limit else "")
    line = (
        f"{name:5} fixed-noise loss {first['eval_loss']:.4f} -> {last['eval_loss']:.4f}: {ratio:.3f} x its start, "
        f"{to_zero:.3f} x predicting zero (wanted: {wanted}); reloaded {reloaded:.4f}, off by {difference:.1e}"
    )
    return line + ("" if good else "   NOT REACHED"), good


def main(folder: Path) -> int:
    times = [line.split("\t") for line in (folder / "times.tsv").read_text().splitlines()]
    made = {
        "tiny checkpoint": "model", "training clips": "clips", "driving clips": "drive",
        "reports and contact sheets": "report, report-drive", "cached conditions": "latents",
        "LoRA run": "lora (loss.png, metrics.jsonl)", "full run": "full (loss.png, metrics.jsonl)",
        "exported LoRA": "lora.safetensors", "exported weights": "full-export",
    }  # fmt: skip
    print(f"\n== summary\nEverything is in {folder}/:")
    for what, where in made.items():
        print(f"  {what:26} {where}")
    print("Seconds:")
    for name, seconds in times:
        print(f"  {int(seconds):5}  {name}")
    print(f"  {sum(int(seconds) for _, seconds in times):5}  in all")
    lines = [judge(name, folder) for name in LIMITS]
    print("Learnt (each training sample at 8 noise levels, noise fixed, before and after):")
    for line, _ in lines:
        print(f"  {line}")
    return 0 if all(good for _, good in lines) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
