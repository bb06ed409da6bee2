import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from small_runs import DEMO, NETWORK_OPTIONS, SMALL_OPTIONS, assert_same_rows, part_of, rejections, rows_of, run_job

from preprocessing.job import RunStopped
from preprocessing.ledger import Ledger
from wan_accel.data import store

KILLS = int(os.environ.get("WAN_ACCEL_KILLS", "4"))
ANIMATE = [sys.executable, "-m", "preprocessing.cli", "animate", *SMALL_OPTIONS, *NETWORK_OPTIONS, "--num-threads=1"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six short videos, one of them cut short."""
    folder = tmp_path_factory.mktemp("videos")
    for number, start in enumerate((0, 20, 40)):
        part_of("walker.mp4", folder / f"walk{number}.mp4", range(start, start + 32))
    for number, start in enumerate((0, 30)):
        part_of("jumping.mp4", folder / f"jump{number}.mp4", range(start, start + 32))
    (folder / "cut.mp4").write_bytes((DEMO / "videos/walker.mp4").read_bytes()[:20_000])
    return sorted(folder.glob("*.mp4"))


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """The output of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed") / "clips"
    run_job(videos, output, workers=2)
    return output


def without_paths(output):
    return sorted((r["path"], r["clip_id"], r["reason"]) for r in rejections(output))


def test_every_video_gives_rows_or_a_reason(undisturbed, videos):
    assert len(rows_of(undisturbed)) == 10
    assert [(r["path"], r["reason"]) for r in rejections(undisturbed)] == [(str(videos[0].resolve()), "unreadable")]
    assert store.verify(undisturbed) == []
    outcomes = Ledger(undisturbed).outcomes
    assert {key: o.num_clips for key, o in outcomes.items()} == {
        str(v.resolve()): 0 if v.name == "cut.mp4" else 2 for v in videos
    }
    assert not list((undisturbed / "work/leases").iterdir()) and not list((undisturbed / "work/jobs").iterdir())


def test_a_second_run_has_nothing_to_do(undisturbed, videos):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.glob("parts/*/*")}
    summary = run_job(videos, undisturbed)
    assert (summary.todo, summary.clips, summary.finished, summary.rejected) == (0, 0, 5, 1)
    assert {p: p.stat().st_mtime_ns for p in undisturbed.glob("parts/*/*")} == before


def test_one_worker_makes_the_rows_of_two(undisturbed, videos, tmp_path):
    run_job(videos, tmp_path / "clips", workers=1)
    assert_same_rows(tmp_path / "clips", undisturbed)


def test_killed_at_any_moment_a_run_goes_on_to_the_same_rows(undisturbed, videos, tmp_path):
    """kill -9 of the job, whose workers die with it; WAN_ACCEL_KILLS sets how often."""
    output, command = (
        tmp_path / "clips",
        [*ANIMATE, str(videos[0].parent), "--commit-seconds=0.5", "--workers-per-device=2"],
    )
    generator = random.Random(KILLS)
    for _ in range(KILLS):
        job = subprocess.Popen([*command, f"--output={output}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.5, 6.0))
        workers = psutil.Process(job.pid).children() if job.poll() is None else []
        job.kill()
        job.wait()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert not alive
        if (output / "state.json").is_file():
            rows_of(output)  # what is committed loads at any moment
    finished = subprocess.run([*command, f"--output={output}"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert_same_rows(output, undisturbed)
    assert without_paths(output) == without_paths(undisturbed)
    assert store.verify(output) == []
    assert not list(output.glob("parts/*/*.tmp")) and not list((output / "work/leases").iterdir())


def test_jobs_join_and_die_and_the_rest_finishes(undisturbed, videos, tmp_path):
    output = tmp_path / "clips"
    command = [*ANIMATE, *map(str, videos), f"--output={output}", "--commit-seconds=0.5"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: (output / "work/leases").is_dir() and list((output / "work/leases").iterdir()))
    second = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((output / "work/jobs").glob("*.json"))) == 2)
    first.kill()
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert_same_rows(output, undisturbed)
    assert without_paths(output) == without_paths(undisturbed)


def test_a_worker_that_dies_costs_nothing(undisturbed, videos, tmp_path):
    killed = []

    def kill_one() -> None:
        """End the first worker that is at work, as the kernel does when memory is short."""
        job = psutil.Process()
        wait_for(lambda: (tmp_path / "clips/work/leases").is_dir() and list((tmp_path / "clips/work/leases").iterdir()))
        worker = next(child for child in job.children() if "spawn_main" in " ".join(child.cmdline()))
        worker.send_signal(signal.SIGSEGV)
        killed.append(worker.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    run_job(videos, tmp_path / "clips")
    thread.join()
    assert killed
    assert_same_rows(tmp_path / "clips", undisturbed)
    assert without_paths(tmp_path / "clips") == without_paths(undisturbed)


def test_a_video_that_kills_every_worker_is_given_up(videos, tmp_path):
    stop = threading.Event()

    def kill_all() -> None:
        seen = set()
        while not stop.is_set():
            leases = tmp_path / "clips/work/leases"
            busy = leases.is_dir() and any(leases.iterdir())
            for child in psutil.Process().children() if busy else []:
                is_worker = "spawn_main" in " ".join(child.cmdline())
                if child.pid not in seen and is_worker and len(seen) < 2:
                    seen.add(child.pid)
                    time.sleep(0.2)
                    child.kill()
            time.sleep(0.02)

    thread = threading.Thread(target=kill_all)
    thread.start()
    summary = run_job([videos[1]], tmp_path / "clips")
    stop.set()
    thread.join()
    assert (summary.finished, summary.rejected) in {(0, 1), (1, 0)}
    if summary.rejected:
        assert rejections(tmp_path / "clips")[0]["reason"] == "crashed"


def test_a_video_that_takes_too_long_is_given_up_and_can_be_retried(videos, tmp_path):
    output = tmp_path / "clips"
    slow = part_of("walker.mp4", tmp_path / "slow.mp4", list(range(90)) * 3)
    summary = run_job([slow, videos[1]], output, options={"timeout_seconds": 2.0}, num_frames=9, fps=30.0)
    reasons = {r["path"]: r["reason"] for r in rejections(output)}
    assert reasons[str(slow.resolve())] == "timeout"
    assert summary.rejected == len(reasons)
    with pytest.raises(
        ValueError, match=r"--retry-rejected crashed: nothing was rejected as crashed; there are timeout"
    ):
        run_job([slow, videos[1]], output, options={"retry_rejected": "crashed"}, num_frames=9, fps=30.0)
    summary = run_job([slow, videos[1]], output, options={"retry_rejected": "timeout"}, num_frames=9, fps=30.0)
    assert (summary.todo, summary.finished, summary.rejected) == (len(reasons), 2, 0)
    assert rejections(output) == []
    assert (
        len(
            {
                row["source"]["path"] if isinstance(row["source"], dict) else name
                for name, row in rows_of(output).items()
            }
        )
        == 2
    )


def test_a_run_that_rejects_most_videos_stops(videos, tmp_path):
    broken = []
    for number in range(25):
        path = tmp_path / f"broken{number:02}.mp4"
        path.write_bytes(b"no video" * (number + 1))
        broken.append(path)
    with pytest.raises(
        RunStopped, match=r"20 of 20 videos were rejected, more than --max-reject-rate 0\.5; the last: .*broken19"
    ):
        run_job(broken, tmp_path / "clips", options={"max_reject_rate": 0.5})
    assert len(rejections(tmp_path / "clips")) == 20  # known, and not looked at again


def test_other_settings_are_refused_before_networks_are_opened(undisturbed, videos):
    start = time.monotonic()
    with pytest.raises(store.StoreError, match=r"other settings \(fps: 10\.0 there, 5\.0 now\)"):
        run_job(videos, undisturbed, fps=5.0)
    assert time.monotonic() - start < 2


def test_sigterm_ends_a_run_that_goes_on_later(undisturbed, videos, tmp_path):
    output = tmp_path / "clips"
    command = [*ANIMATE, *map(str, videos), f"--output={output}", "--commit-seconds=0.5"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list(output.glob("parts/*/*.json")))
    job.terminate()
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    run_job(videos, output)
    assert_same_rows(output, undisturbed)


def wait_for(condition, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
