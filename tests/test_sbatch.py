"""The job script for Slurm, with stand-ins for Slurm's own commands: there is no Slurm where the tests run."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from small_job import CONFIGS, launch_env, run_state, wait_for_step, write_job

from wan_accel import checkpoint

ROOT = Path(__file__).parents[1]
# srun starts its command on every node (here: one), scancel signals all processes that it started, not the job script.
COMMANDS = {
    "srun": 'shift; echo $$ > "$SLURM_STUB/step"; exec setsid "$@"',
    "scancel": """echo "scancel $*" >> "$SLURM_STUB/calls"
      for pid in $(cat "$SLURM_STUB/step") $(python3 -c '
import psutil, sys
print(*[p.pid for p in psutil.Process(int(sys.argv[1])).children(recursive=True)])' "$(cat "$SLURM_STUB/step")"); do
        kill -USR1 "$pid"
      done""",
    "scontrol": """if [ "$1" = show ]; then echo 127.0.0.1; else echo "scontrol $*" >> "$SLURM_STUB/calls"; fi""",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.launch
def test_a_job_that_is_told_to_end_saves_and_is_queued_again(stubs: Path, tmp_path: Path) -> None:
    recipe, run = write_job(tmp_path), tmp_path / "run"
    env = launch_env(
        PATH=f"{stubs}:{os.environ['PATH']}", SLURM_STUB=str(tmp_path), SLURM_JOB_ID="4711", SLURM_NNODES="1",
        SLURM_JOB_NODELIST="node[1]", SLURM_NODEID="0", GPUS_PER_NODE="2",
        ACCELERATE_CONFIG=str(CONFIGS / "cpu_fsdp2.yaml"),
    )  # fmt: skip
    script = ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch"), str(recipe)]
    job = subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for_step(run, 2, is_alive=lambda: job.poll() is None)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0
    finally:
        job.kill()
    state = run_state(run)
    assert state["state"] == "preempted"
    assert checkpoint.last_checkpoint(run) == run / f"checkpoint-{state['step']}"
    assert (tmp_path / "calls").read_text() == "scancel --signal=USR1 4711\nscontrol requeue 4711\n"
