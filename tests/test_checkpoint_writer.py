"""Checkpoints are written beside training, hashed, and complete or not there."""

import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import write_checkpoint
from ranks import run_ranks, start_ranks

from wan_accel import checkpoint, checkpoint_writer
from wan_accel.checkpoint import Manifest
from wan_accel.checkpoint_verify import verify
from wan_accel.checkpoint_writer import CheckpointWriter, Job
from wan_accel.cli import main

NUM_KILLS = int(os.environ.get("WAN_ACCEL_KILLS", "4"))
MANIFEST = Manifest(
    engine="single", step=1, variant="t2v-1.3b", expert="default", method="full", base="", lora=None, world_size=1,
    ulysses=1, trained={},
)  # fmt: skip


def train(base: str, output_dir: str, engine: str, num_steps: int, **arguments: Any) -> dict[str, torch.Tensor]:
    """Train to `num_steps` with a checkpoint every step, going on from the newest; returns the weights."""
    from small_run import full_weights, small_trainer

    trainer = small_trainer(
        base, output_dir, engine, max_steps=num_steps, save_steps=1, save_total_limit=2, **arguments
    )
    newest = checkpoint.last_checkpoint(Path(output_dir))
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return full_weights(trainer)


def test_what_is_written_is_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes a weight while the thread has not yet begun to write it."""
    weight, save = torch.arange(1000.0), dcp.save
    has_changed = checkpoint_writer.threading.Event()

    def save_later(*args: Any, **kwargs: Any) -> Any:
        assert has_changed.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", save_later)
    writer = CheckpointWriter()
    folder = checkpoint.start(tmp_path, 1)
    job = Job(folder=folder, manifest=MANIFEST, parts={"model": {"w": weight}}, keep=1, sharded=False)
    writer.write(job, beside=True)
    weight.zero_()
    has_changed.set()
    assert checkpoint.last_checkpoint(tmp_path) is None
    writer.wait()
    state = {"w": torch.empty(1000)}
    dcp.load(state, checkpoint_id=str(tmp_path / "checkpoint-1" / "model"), no_dist=True)
    assert torch.equal(state["w"], torch.arange(1000.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_damage_is_found(base: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    run_ranks(train, 2, str(base), str(run), engine, 2, engine=engine)
    last = run / "checkpoint-2"
    files = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()}
    assert set(checkpoint.read_sums(run / "checkpoint-2")) == files - {"manifest.json"}
    assert main(["checkpoint", "verify", str(run)]) == 0
    (run / "checkpoint-3.tmp").mkdir()  # a save that goes on, or was torn
    assert main(["checkpoint", "verify", str(run), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(one["name"], one["state"]) for one in lines] == [
        ("checkpoint-1", "complete"), ("checkpoint-2", "complete"), ("checkpoint-3.tmp", "torn")
    ]  # fmt: skip

    largest = max((run / "checkpoint-2").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert checkpoint.last_checkpoint(run) == run / "checkpoint-2"  # sizes are right: only reading finds it
    assert main(["checkpoint", "verify", str(run / "checkpoint-2")]) == 1
    name = largest.relative_to(run / "checkpoint-2")
    assert f"checkpoint-2: damaged: {name} has other content than what was written" in capsys.readouterr().out

    largest.write_bytes(content[:-1])
    assert checkpoint.last_checkpoint(run) == run / "checkpoint-1"
    [verdict] = verify(run / "checkpoint-2")
    assert verdict.problems == (f"{name} has {len(content) - 1} bytes of {len(content)}",)


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert "holds no checkpoint: give a run's output_dir or a checkpoint-N folder" in capsys.readouterr().err
    checkpoint.commit(checkpoint.start(tmp_path, 1), MANIFEST, keep=None)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "kept no checksums" in capsys.readouterr().out


def train_on_a_full_disk(base: str, output_dir: str) -> tuple[int, str]:
    """Rank 1 can write no file of more than a few bytes from step 2 on; returns when and how the run ended."""
    from small_run import small_trainer
    from transformers import TrainerCallback

    class FillDisk(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and args.process_index == 1:
                trainer.writer.wait()  # checkpoint-1 is to be whole
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    trainer = small_trainer(base, output_dir, "fsdp2", max_steps=50, save_steps=1, callbacks=[FillDisk()])
    try:
        trainer.train()
    except checkpoint_writer.SaveError as error:
        return trainer.state.global_step, str(error)
    return 0, ""


def test_a_rank_that_cannot_write_ends_the_run(base: Path, tmp_path: Path) -> None:
    ends = run_ranks(train_on_a_full_disk, 2, str(base), str(tmp_path / "run"), engine="fsdp2")
    assert ends[0] == ends[1]
    step, message = ends[0]
    assert 2 <= step < 50
    assert message.startswith("checkpoint-2 could not be written (rank 1: OSError: [Errno 27] File too large). Checkp")
    assert checkpoint.last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert {verdict.state for verdict in verify(tmp_path / "run")} == {"complete", "torn"}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_killed_at_any_moment_of_a_save(base: Path, tmp_path: Path, engine: str) -> None:
    """What is there after every kill -9 is whole, the newest step never falls, and the run ends as if undisturbed."""
    run, num_steps, chance = tmp_path / "run", 1000, random.Random(0)
    newest = 0
    for _ in range(NUM_KILLS):
        workers = start_ranks(train, 2, str(base), str(run), engine, num_steps, engine=engine)
        _wait_for_a_save(run, after=newest)
        time.sleep(chance.uniform(0, 0.3))
        for process, _ in workers:
            process.kill()
        for process, _ in workers:
            process.join()
        verdicts = list(verify(run))
        assert {verdict.state for verdict in verdicts} <= {"complete", "torn"}, verdicts
        last = checkpoint.last_checkpoint(run)
        assert last is not None
        step = checkpoint.read_manifest(last).step
        assert step >= newest
        newest = step
    ended = run_ranks(train, 2, str(base), str(run), engine, newest + 2, engine=engine)[0]
    whole = run_ranks(train, 2, str(base), str(tmp_path / "whole"), engine, newest + 2, engine=engine)[0]
    assert all(torch.equal(ended[name], whole[name]) for name in whole)
    assert {verdict.state for verdict in verify(run)} == {"complete"}  # what was torn is cleared


def _wait_for_a_save(run: Path, *, after: int) -> None:
    """Until a checkpoint is complete that was not there before, and another one is being written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saving = [int(path.stem.partition("-")[2]) for path in run.glob("checkpoint-*.tmp") if ".old" not in path.name]
        if any(step > after + 1 for step in saving):
            return
        time.sleep(0.001)
    raise TimeoutError("no save began")
