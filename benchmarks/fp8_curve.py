"""Training with `memory.fp8` beside training without: `python benchmarks/fp8_curve.py`, 20 minutes on a CPU.

Trains the tiny t2v-1.3b on clips of the demo's videos, as a LoRA and in full, each with the same samples, noise and
order: in bf16, and in bf16 with fp8 products; and in fp32, to tell what bf16's own rounding does to the loss. The runs
are those of `wan_accel.train`. A GPU multiplies in fp8, in compiled blocks; the CPU emulates its rounding, and runs
blocks eagerly. Writes a picture of the losses and a few figures into `--folder`.
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

DEMO_VIDEOS = Path(__file__).parents[1] / "demo/videos"
LEARNING_RATES = {"lora": 5e-3, "full": 3e-3}
TITLES = {"lora": "LoRA of rank 32", "full": "full training"}
# Mixed precision of the accelerate config, and memory.fp8.
WAYS = {"fp32": ("no", False), "bf16": ("bf16", False), "fp8": ("bf16", True)}
RECIPE = """
variant: t2v-1.3b
model: {{checkpoint: {folder}/model}}
method: {{kind: full}}
data: {{clips: {folder}/clips, latents: {folder}/latents, global_batch: {{samples: 4}}, micro_batch: {{samples: 4}}}}
objective: {{shift: 1.0}}
memory: {{activation_checkpointing: none, compile: true}}
training:
  output_dir: {folder}/run
  lr_scheduler_type: constant
  logging_steps: 1
  save_strategy: "no"
  resume_from_checkpoint: never
  disable_tqdm: true
  dataloader_num_workers: 0
  seed: 0
"""
Losses = dict[str, list[float]]  # of every step, by way


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """Two smoothed losses: where the second is furthest from the first, and at the end, in percent of the first."""

    largest_percent: float
    at_step: int
    last_percent: float


def smoothed(losses: list[float], window: int) -> list[float]:
    """The mean over the last `window` steps, from step `window` on."""
    sums = [0.0, *itertools.accumulate(losses)]
    return [(after - before) / window for before, after in zip(sums, sums[window:])]


def gaps_percent(base: list[float], other: list[float], window: int) -> list[float]:
    curves = zip(smoothed(base, window), smoothed(other, window), strict=True)
    return [100 * (found / expected - 1) for expected, found in curves]


def measure(base: list[float], other: list[float], window: int) -> Gap:
    """Compare two runs.

    Raises:
        RuntimeError: their losses are the same, so that they computed in the same precision.
    """
    if base == other:
        raise RuntimeError("two runs have the same losses to the last bit: both computed in the same precision")
    gaps = gaps_percent(base, other, window)
    place = max(range(len(gaps)), key=lambda index: abs(gaps[index]))
    return Gap(largest_percent=round(gaps[place], 4), at_step=place + window, last_percent=round(gaps[-1], 4))


def figures(losses: Losses, window: int) -> dict[str, object]:
    """First and last smoothed loss of each way, and how far apart they are."""
    ends = {way: [round(smoothed(curve, window)[end], 4) for end in (0, -1)] for way, curve in losses.items()}
    return {
        "first_and_last": ends,
        "fp8_over_bf16": asdict(measure(losses["bf16"], losses["fp8"], window)),
        "bf16_over_fp32": asdict(measure(losses["fp32"], losses["bf16"], window)),
    }


def make_data(folder: Path) -> Path:
    """A tiny checkpoint, clips of the demo's videos and their latents, what is not there yet; returns the recipe."""
    from preprocessing import cli
    from wan_accel import cache
    from wan_accel.tiny import init_tiny

    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    if not (folder / "model").exists():
        init_tiny("t2v-1.3b", folder / "model")
    if not (folder / "clips").exists():
        videos = [str(DEMO_VIDEOS / name) for name in ("walker.mp4", "jumping.mp4")]
        small = ["--num-frames=9", "--resolution-area=96*160", "--max-clips=6", "--caption=a person moves"]
        _succeed(cli.main(["clips", *videos, f"--output={folder / 'clips'}", *small]))
    _succeed(cache.main([str(recipe)]))
    return recipe


def losses_of(recipe: Path, method: str, way: str, num_steps: int) -> list[float]:
    """The loss of every step of a run."""
    from accelerate.state import AcceleratorState

    from wan_accel import train

    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is the process' otherwise
    os.environ["ACCELERATE_MIXED_PRECISION"], fp8 = WAYS[way]  # as `accelerate launch --mixed_precision` sets it
    output = recipe.parent / f"{method}-{way}"
    changes = [f"method.kind={method}", f"memory.fp8={str(fp8).lower()}", f"training.max_steps={num_steps}"]
    changes += [f"training.learning_rate={LEARNING_RATES[method]}", f"training.output_dir={output}"]
    _succeed(train.main([str(recipe), *changes]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _succeed(code: int) -> None:
    if code:
        raise SystemExit(code)  # whoever failed has said why


def draw(found: dict[str, Losses], window: int, about: str, picture: Path) -> None:
    """A column a method: losses above, pale as they are and strong smoothed; below, how far apart they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        2, len(found), figsize=(5.5 * len(found), 6.5), dpi=120, sharex=True, squeeze=False, height_ratios=(2, 1),
        layout="constrained",
    )  # fmt: skip
    for (method, losses), above, below in zip(found.items(), *grid):
        steps = range(window, len(losses["bf16"]) + 1)
        for way, label, style in (("bf16", "bf16", "C0-"), ("fp8", "bf16 with fp8", "C1--")):
            above.plot(range(1, len(losses[way]) + 1), losses[way], style[:2], alpha=0.15, linewidth=0.8)
            above.plot(steps, smoothed(losses[way], window), style, label=f"{label}, mean of {window} steps")
        for base, other, color in (("fp32", "bf16", "C7"), ("bf16", "fp8", "C3")):
            gaps = gaps_percent(losses[base], losses[other], window)
            below.plot(steps, gaps, color=color, linewidth=1.2, label=f"{other} over {base}")
        above.set(
            title=f"{TITLES[method]}, learning rate {LEARNING_RATES[method]:g}", ylabel="loss (mean squared error)"
        )
        below.set(xlabel="optimizer step", ylabel="smoothed gap, %")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.legend()
    figure.suptitle(about)
    figure.savefig(picture)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=25, help="steps that the losses are smoothed over")
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--folder", type=Path, default=Path("output/fp8-curve"), help="data, runs, picture, figures")
    arguments = parser.parse_args(argv)
    folder, window = arguments.folder, arguments.window
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "CPU, where fp8 is an emulation of its rounding"
        torch.compiler.set_stance("force_eager")  # compiling takes longer than these runs
    recipe = make_data(folder)
    found = {
        method: {way: losses_of(recipe, method, way, arguments.steps) for way in WAYS} for method in arguments.methods
    }
    about = {"device": device, "torch": torch.__version__, "steps": arguments.steps, "window": window}
    about |= {method: figures(losses, window) for method, losses in found.items()}
    (folder / "fp8_curve.json").write_text(json.dumps(about, indent=1))
    draw(found, window, f"tiny t2v-1.3b, same samples and noise; {device}", folder / "fp8_curve.png")
    print(json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
