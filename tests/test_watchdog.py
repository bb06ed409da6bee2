"""A rank that hangs, dies or fails ends the run soon, and the message says which rank and where."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from ranks import run_ranks, start_ranks

from wan_accel.parallel.agreement import name_ranks
from wan_accel.watchdog import EXIT_CODE
from wan_accel.watchdog_posts import Post, describe_hang, furthest_behind

SECONDS = 4.0  # a busy machine makes no rank this slow


def fall_asleep() -> None:
    time.sleep(1000)


def train(base: str, output_dir: str, engine: str, trouble: str, hang_seconds: float) -> int:
    """Train; rank 1 gets into trouble after step 3."""
    from small_run import small_trainer
    from transformers import TrainerCallback

    from wan_accel.train import run

    class Trouble(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 3 or args.process_index != args.world_size - 1:
                return
            if trouble == "sleeps":
                fall_asleep()
            if trouble == "fails":
                raise OSError("no such clip")
            if trouble == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)

    trainer = small_trainer(
        base, output_dir, engine, max_steps=5, callbacks=[Trouble()], hang_seconds=hang_seconds, report_to="none"
    )
    try:
        return run(trainer, None)
    except OSError:
        fall_asleep()  # as a rank that its launcher does not see end
        raise


def end_of(workers: list[Any], run: Path) -> tuple[list[int | None], dict[str, Any]]:
    """Exit codes of the ranks, and what the run says of itself."""
    for process, _ in workers:
        process.join(60 if process is workers[0][0] else 5)
    codes = [process.exitcode for process, _ in workers]
    for process, _ in workers:
        process.kill()
    return codes, json.loads((run / "run_state.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), "t2v-1.3b")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_that_hangs_is_named_with_its_stack(base: Path, engine: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    workers = start_ranks(train, 2, str(base), str(run), engine, "sleeps", SECONDS, engine=engine)
    codes, state = end_of(workers, run)
    assert codes == [EXIT_CODE, EXIT_CODE]
    assert state["state"] == "failed"
    assert state["error"].startswith("rank 1 (") and "did not go on for" in state["error"]
    assert ", while 1 others wait for it further on" in state["error"]
    assert "fall_asleep" in state["error"] and "Stack of rank 0" not in state["error"]
    assert "the same command goes on from the newest checkpoint" in state["error"]


def test_one_process_that_hangs(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    workers = start_ranks(train, 1, str(base), str(run), "single", "sleeps", SECONDS, engine="single")
    codes, state = end_of(workers, run)
    assert codes == [EXIT_CODE]
    assert state["error"].startswith("rank 0 (") and "fall_asleep" in state["error"]


def test_a_rank_that_is_gone_is_named(base: Path, tmp_path: Path) -> None:
    """Stopped, as it would be on a machine that is lost: its sockets stay open, and no collective fails."""
    run = tmp_path / "run"
    workers = start_ranks(train, 2, str(base), str(run), "fsdp2", "stops", SECONDS, engine="fsdp2")
    codes, state = end_of(workers, run)
    assert codes == [EXIT_CODE, None]
    assert "rank 1 (" in state["error"] and "gave no sign of life for 4 s" in state["error"]
    assert (
        f"pid {workers[1][0].pid})" in state["error"]
        and "Last seen " in state["error"]
    )


def test_a_rank_that_failed_is_named_with_its_error(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    workers = start_ranks(train, 2, str(base), str(run), "ddp", "fails", SECONDS, engine="ddp")
    codes, state = end_of(workers, run)
    assert codes[0] == EXIT_CODE
    assert state["error"].startswith("rank 1 (") and "): OSError: no such clip. The run ends" in state["error"]


def test_an_undisturbed_run_is_left_alone(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(train, 2, str(base), str(run), "fsdp2", "", 30.0, engine="fsdp2") == [0, 0]
    assert not list(run.glob("logs/*.stack"))


def test_who_is_behind() -> None:
    def post(position: tuple[int, int], idle: float) -> Post:
        return Post(seq=1, position=position, doing="waiting for data", idle_seconds=idle, host="n", pid=7)

    posts = {0: post((5, 2), 90), 1: post((5, 1), 95), 2: post((5, 2), 90), 3: post((5, 1), 94)}
    assert furthest_behind(posts) == [1, 3]
    text = describe_hang(posts, [1, 3], {1: "here\n"})
    assert text.startswith("ranks 1, 3 did not go on for 95 s: waiting for data, after step 5, while 2 others wait")
    assert "Stack of rank 1:\nhere\n" in text
    everyone = {rank: post((5, 1), 90) for rank in range(3)}
    assert furthest_behind(everyone) == [0, 1, 2]
    assert describe_hang(everyone, [0, 1, 2], {}).startswith(f"{name_ranks([0, 1, 2])} did not go on for 90 s")
    assert Post.decode(post((5, 1), 90).encode().encode()) == post((5, 1), 90)
