"""Two launchers that stand for two machines: they train together, one is lost, the other goes on alone."""

import json
import subprocess
from pathlib import Path

import psutil
import pytest
from ranks import free_port
from small_job import launch_command, launch_env, log_lines, run_state, wait_for_step, write_job

from wan_accel import checkpoint


def launch(recipe: Path, num_machines: int, machine: int, port: int, max_steps: int) -> subprocess.Popen:
    """`accelerate launch` on one of the machines, with one process."""
    options = [
        "--num_machines", str(num_machines), "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port),
    ]  # fmt: skip
    command = launch_command(recipe, *options, processes=num_machines)
    overrides = [f"training.max_steps={max_steps}", "training.save_steps=5"]
    return subprocess.Popen([*command, *overrides], env=launch_env(), stdout=subprocess.DEVNULL)


@pytest.mark.launch
def test_one_of_two_machines_is_lost_and_the_other_goes_on(tmp_path: Path) -> None:
    recipe, run, port = write_job(tmp_path), tmp_path / "run", free_port()
    machines = [launch(recipe, 2, machine, port, 1000) for machine in (0, 1)]
    try:
        wait_for_step(run, 7, is_alive=lambda: machines[0].poll() is None)
        lost = psutil.Process(machines[1].pid)
        for process in (lost, *lost.children(recursive=True)):
            process.kill()
        assert machines[0].wait(90) != 0  # soon, and by itself
    finally:
        for machine in machines:
            machine.kill()
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert run_state(run)["state"] == "failed"
    newest = checkpoint.last_checkpoint(run)
    assert newest is not None
    step, before = checkpoint.read_manifest(newest).step, len(log_lines(run))

    alone = launch(recipe, 1, 0, free_port(), step + 3)
    assert alone.wait(240) == 0
    assert [line["step"] for line in log_lines(run)[before:] if "loss" in line] == [step + 1, step + 2, step + 3]
    assert run_state(run) == {"state": "finished", "step": step + 3}
    assert json.loads((run / "run.json").read_text())["world_size"] == 1
