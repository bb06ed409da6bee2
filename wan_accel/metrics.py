"""What a run reports: metrics.jsonl, a loss curve, run state."""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GIB = 2**30


class MetricsCallback(TrainerCallback):
    """Appends every log line to `metrics.jsonl` and draws the losses at the end. Main process only."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with (Path(str(args.output_dir)) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            output = Path(str(args.output_dir))
            plot_losses(output / "metrics.jsonl", output / "loss.png")
            plot_losses_by_sigma(output / "metrics.jsonl", output / "loss_by_sigma.png")


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training loss and fixed-noise validation loss over steps from a `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = _read_lines(metrics)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for key, label, style in (
        ("loss", "training loss", "-"),
        ("eval_loss", "validation loss, fixed noise", "o-"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4, linewidth=1.3)
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def _read_lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []


def losses_by_sigma(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[float, float]]]:
    """Each evaluation of a `metrics.jsonl`: its step, and the loss of every noise level over all experts.

    A resumed run evaluates the step that it starts from again: the last one counts.
    """
    evaluations: dict[int, dict[float, float]] = {}
    for line in lines:
        names = [key for key in line if key.startswith("eval_loss") and "/sigma_" in key]
        levels = {float(key.rpartition("sigma_")[2]): line[key] for key in names}
        if levels:
            evaluations[int(line["step"])] = dict(sorted(levels.items()))
    return list(evaluations.items())


def plot_losses_by_sigma(metrics: Path, picture: Path) -> None:
    """Draw validation loss by noise level, as it is and against the first evaluation; nothing without validation.

    A curve is an evaluation, early ones pale. Levels differ far more from each other than one does over a run, which
    is why the right half shows what training changed.
    """
    evaluations = losses_by_sigma(_read_lines(metrics))
    if not evaluations:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(10, 4), dpi=120)
    first = evaluations[0][1]
    colors = plt.get_cmap("viridis_r")([0.1 + 0.9 * n / max(len(evaluations) - 1, 1) for n in range(len(evaluations))])
    for (step, levels), color in zip(evaluations, colors):
        style = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1.2, "label": f"step {step}"}
        absolute.plot(list(levels), list(levels.values()), **style)
        shared = [sigma for sigma in levels if sigma in first]
        relative.plot(shared, [levels[sigma] / first[sigma] for sigma in shared], **style)
    absolute.set(xlabel="sigma (0 data, 1 noise)", ylabel="validation loss, fixed noise", ylim=(0, None))
    relative.set(xlabel="sigma (0 data, 1 noise)", ylabel=f"divided by that of step {evaluations[0][0]}")
    for axes in (absolute, relative):
        axes.grid(alpha=0.3)
    handles, labels = absolute.get_legend_handles_labels()
    shown = sorted({round(n * (len(labels) - 1) / 7) for n in range(8)})
    relative.legend([handles[n] for n in shown], [labels[n] for n in shown], fontsize=7)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process since its start: allocated GPU memory, or resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def write_run_state(output_dir: Path, state: str, step: int, error: str | None = None) -> None:
    """Write `run_state.json`: finished, preempted or failed, at which step, and why."""
    content = {"state": state, "step": step} | ({"error": error} if error else {})
    (output_dir / "run_state.json").write_text(json.dumps(content, indent=1))
