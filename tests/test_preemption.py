"""A run that is told to stop saves the step it is at, on all ranks, leaves, and goes on from there."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import write_checkpoint
from ranks import results, run_ranks, start_ranks
from small_job import launch_command, launch_env, log_lines, run_state, wait_for_step, write_job

from wan_accel import checkpoint


def train(base: str, output_dir: str, engine: str, num_steps: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Run a trainer as `wan_accel.train` does; returns its exit code and the weights at the end."""
    from small_run import full_weights, small_trainer

    from wan_accel.train import run

    trainer = small_trainer(base, output_dir, engine, max_steps=num_steps, save_steps=num_steps)
    newest = checkpoint.last_checkpoint(Path(output_dir))
    return run(trainer, str(newest) if newest else None), full_weights(trainer)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_one_rank_is_told_and_all_save(engine: str, told: signal.Signals, tmp_path: Path) -> None:
    base, run = write_checkpoint(tmp_path / "base", "t2v-1.3b"), tmp_path / "run"
    workers = start_ranks(train, 2, str(base), str(run), engine, 100_000, engine=engine)
    wait_for_step(run, 2)
    os.kill(workers[1][0].pid, told)
    assert [code for code, _ in results(workers)] == [0, 0]
    state = run_state(run)
    assert state["state"] == "preempted" and 2 <= state["step"] < 100_000
    assert checkpoint.last_checkpoint(run) == run / f"checkpoint-{state['step']}"
    end = state["step"] + 2
    resumed = run_ranks(train, 2, str(base), str(run), engine, end, engine=engine)[0][1]
    whole = run_ranks(train, 2, str(base), str(tmp_path / "whole"), engine, end, engine=engine)[0][1]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert run_state(run) == {"state": "finished", "step": end}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def launched(recipe: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process], Path]]:
    """A run on 2 FSDP2 ranks that `accelerate launch` started, as a job script would: SIGUSR1 does not end it."""
    run = tmp_path / "run"
    ignoring = ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash"]
    command = [*ignoring, *launch_command(recipe), f"training.output_dir={run}"]
    launcher = subprocess.Popen(command, env=launch_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ranks: list[psutil.Process] = []
    try:
        wait_for_step(run, 2)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        yield launcher, ranks, run
    finally:
        launcher.kill()
        launcher.wait()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def ended(processes: list[psutil.Process], run: Path) -> dict[str, Any]:
    """Wait for all processes of a run to be gone; returns what it says of itself."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, alive
    return run_state(run)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("told", "who", "code"),
    [(signal.SIGTERM, "launcher", 1), (signal.SIGKILL, "launcher", -9), (signal.SIGUSR1, "all", 0)],
)
def test_a_launched_run_saves_and_leaves_nobody_behind(
    told: signal.Signals, who: str, code: int, launched: tuple[subprocess.Popen, list[psutil.Process], Path]
) -> None:
    """accelerate's launcher passes SIGTERM on and ends with 1; ranks that a killed one leaves notice by themselves."""
    launcher, ranks, run = launched
    assert len(ranks) >= 2
    launcher.send_signal(told)
    for rank in ranks if who == "all" else []:  # as `scancel --signal` does
        rank.send_signal(told)
    state = ended(ranks, run)
    assert launcher.wait(60) == code
    assert state["state"] == "preempted"
    assert checkpoint.last_checkpoint(run) == run / f"checkpoint-{state['step']}"


@pytest.mark.launch
def test_a_launcher_that_may_restart_goes_on_after_a_rank_was_killed(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*launch_command(recipe, "--max_restarts", "1"), f"training.output_dir={run}"]
    launcher = subprocess.Popen(
        [*command, "training.max_steps=60", "training.save_steps=5"], env=launch_env(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_step(run, 12)
        psutil.Process(launcher.pid).children()[1].kill()
        assert launcher.wait(240) == 0
    finally:
        launcher.kill()
    assert run_state(run) == {"state": "finished", "step": 60}
    steps = [line["step"] for line in log_lines(run)]
    again = [later for before, later in zip(steps, steps[1:]) if later < before]
    assert len(again) == 1 and again[0] % 5 == 1 and again[0] > 5  # from the newest checkpoint, not from the start
