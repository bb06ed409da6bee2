"""What a run reports: metrics.jsonl, a loss curve, run state."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GIB = 2**30


class MetricsCallback(TrainerCallback):
    """Appends every log line to `metrics.jsonl` and draws `loss.png` at the end. Main process only."""

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


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training loss and fixed-noise validation loss over steps from a `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
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


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process since its start: allocated GPU memory, or resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def write_run_state(output_dir: Path, state: str, step: int, error: str | None = None) -> None:
    """Write `run_state.json`: finished, preempted or failed, at which step, and why."""
    content = {"state": state, "step": step} | ({"error": error} if error else {})
    (output_dir / "run_state.json").write_text(json.dumps(content, indent=1))
