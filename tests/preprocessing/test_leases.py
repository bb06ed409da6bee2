import json
import os
import subprocess
import sys
import time

import pytest

from preprocessing.leases import Leases, holds, living_jobs, new_job_name

HOLDER = """
import sys, time
from pathlib import Path
from preprocessing.leases import Leases
leases = Leases(Path(sys.argv[1]), "holder", lease_seconds=60)
assert leases.claim("video")
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def job(tmp_path):
    leases = Leases(tmp_path, new_job_name(), lease_seconds=1.0)
    yield leases
    leases.close()


def foreign(tmp_path, name="elsewhere", age_seconds=0.0):
    """A job of another machine that holds `video`, whose last heartbeat is that old."""
    path = tmp_path / "work/jobs" / f"{name}.json"
    path.write_text(json.dumps({"host": "other", "boot": "x", "namespace": "y", "pid": 1, "process_started": 0}))
    os.utime(path, (time.time() - age_seconds,) * 2)
    leases = Leases(tmp_path, name, lease_seconds=1000)
    assert leases.claim("video")
    leases._stop.set()
    path.write_text(json.dumps({"host": "other", "boot": "x", "namespace": "y", "pid": 1, "process_started": 0}))
    os.utime(path, (time.time() - age_seconds,) * 2)


def test_a_video_has_one_holder(job, tmp_path):
    other = Leases(tmp_path, new_job_name(), lease_seconds=1.0)
    assert job.claim("video") and job.claim("video")
    assert not other.claim("video")
    assert (job.holds("video"), other.holds("video")) == (True, False)
    job.release(["video"])
    assert other.claim("video")
    job.release(["video"])  # not its own any more: stays
    assert other.holds("video")
    other.close()


def test_a_job_that_was_killed_on_this_machine_is_dead_at_once(job, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "claimed\n"
    assert not job.claim("video")
    assert set(living_jobs(tmp_path)) == {job.job, "holder"}
    holder.kill()
    holder.wait()
    assert job.claim("video")
    assert job.bury() == ["holder"]
    assert living_jobs(tmp_path) == [job.job]


def test_a_job_elsewhere_is_dead_when_its_heartbeat_stops(job, tmp_path):
    foreign(tmp_path, age_seconds=0.0)
    assert not job.claim("video")
    os.utime(tmp_path / "work/jobs/elsewhere.json", (time.time() - 2,) * 2)
    assert job.claim("video")


def test_the_heartbeat_keeps_a_job_alive(tmp_path):
    leases = Leases(tmp_path, "beating", lease_seconds=0.6)
    path = tmp_path / "work/jobs/beating.json"
    os.utime(path, (0, 0))
    time.sleep(0.4)
    assert time.time() - path.stat().st_mtime < 0.5
    leases.close()
    assert not path.exists()


def test_of_many_that_take_a_dead_jobs_video_one_gets_it(tmp_path):
    take = """
import sys
from pathlib import Path
from preprocessing.leases import Leases, new_job_name
leases = Leases(Path(sys.argv[1]), new_job_name(), lease_seconds=30)
sys.stdin.readline()
print(sum(leases.claim(f"video{i}") for i in range(50)), flush=True)
sys.stdin.readline()
"""
    dead = Leases(tmp_path, "dead", lease_seconds=30)
    assert all(dead.claim(f"video{i}") for i in range(50))
    dead.close()
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", take, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for step in range(2):
        for taker in takers:
            taker.stdin.write("go\n")
            taker.stdin.flush()
        if step == 0:
            counts = [int(taker.stdout.readline()) for taker in takers]
    for taker in takers:
        taker.wait()
    assert sum(counts) == 50
    assert len(list((tmp_path / "work/leases").iterdir())) == 2 * 50  # the dead job's, and one for each video


def test_a_job_that_stood_still_cannot_end_a_lease_that_it_never_saw(job, tmp_path, monkeypatch):
    """It finds the dead job's lease, stands still while another takes over, and goes on with what it knows."""
    dead, other = (Leases(tmp_path, name, lease_seconds=30) for name in ("dead", "other"))
    assert dead.claim("video")
    dead.close()
    look = Leases._is_held

    def look_and_stand_still(leases, lease):
        held = look(leases, lease)
        if leases is job:
            assert other.claim("video")
        return held

    monkeypatch.setattr(Leases, "_is_held", look_and_stand_still)
    assert not job.claim("video")
    assert (other.holds("video"), job.holds("video")) == (True, False)
    other.close()


def test_a_released_video_leaves_nothing_and_wakes_no_older_lease(job, tmp_path):
    foreign(tmp_path, age_seconds=2.0)
    assert job.claim("video")
    job.release(["video"])
    assert list((tmp_path / "work/leases").iterdir()) == []
    assert not holds(tmp_path, "video", "elsewhere")


def test_an_empty_lease_is_a_claim_at_this_moment(job, tmp_path):
    assert job.claim("video")
    (lease,) = (tmp_path / "work/leases").iterdir()
    lease.write_text("")
    assert not job.claim("video")
    os.utime(lease, (0, 0))  # ... or one that was killed long ago
    assert job.claim("video")
