import json
import os
from pathlib import Path

from preprocessing.ledger import Ledger

HOUR_NANOSECONDS = 3600 * 10**9


def commit(output: Path, writer: str, number: int, *keys: str) -> Path:
    """Put a sidecar where a worker's commit puts it; the ledger reads nothing else."""
    videos = [{"key": key, "num_clips": 1, "rejected": [], "seconds": 1.0, "time": float(number)} for key in keys]
    folder = output / "parts" / writer
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"data-{number:05}.arrow.json").write_text(json.dumps({"journal": {"videos": videos}}))
    return folder


def age(folder: Path) -> None:
    """Make a folder look unchanged for an hour."""
    seconds_ago = folder.stat().st_mtime_ns - HOUR_NANOSECONDS
    os.utime(folder, ns=(seconds_ago, seconds_ago))


def test_commits_of_all_writers_are_found_as_they_come(tmp_path):
    commit(tmp_path, "a-0", 0, "one")
    ledger = Ledger(tmp_path)
    assert set(ledger.outcomes) == {"one"}
    age(commit(tmp_path, "b-0", 0, "two", "three"))
    ledger.refresh()
    age(commit(tmp_path, "a-0", 1, "four"))
    ledger.refresh()
    assert set(ledger.outcomes) == {"one", "two", "three", "four"}


def test_a_folder_that_was_quiet_for_long_is_read_again_when_it_changes(tmp_path):
    folder = commit(tmp_path, "a-0", 0, "one")
    age(folder)
    ledger = Ledger(tmp_path)
    ledger.refresh()
    commit(tmp_path, "a-0", 1, "two")
    ledger.refresh()
    assert set(ledger.outcomes) == {"one", "two"}


def test_the_latest_outcome_counts(tmp_path):
    commit(tmp_path, "a-0", 5, "one")
    commit(tmp_path, "b-0", 3, "one")
    assert Ledger(tmp_path).outcomes["one"].time == 5.0
