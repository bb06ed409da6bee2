"""Damaged videos end in frames or rows or in a reason; the full counts run with benchmarks/fuzz_videos.py."""

import os
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
CASES = int(os.environ.get("WAN_ACCEL_FUZZ_CASES", "35"))  # five of each source


@pytest.fixture(scope="module")
def fuzz():
    """The scripts, which lie in no package."""
    sys.path.insert(0, BENCHMARKS)
    import fuzz_pipeline
    import fuzz_videos

    yield fuzz_videos, fuzz_pipeline
    sys.path.remove(BENCHMARKS)


def test_damaged_videos_neither_crash_nor_hang(fuzz):
    counts, longest = fuzz[0].run(42, seed=0, timeout_seconds=30)
    assert sum(counts.values()) == 42
    assert {kind for kind, _ in counts} == {"frames", "reason"}, counts
    assert longest < 30


@pytest.mark.parametrize("kind", ["clips", "animate"])
def test_damaged_videos_give_rows_or_a_reason(fuzz, kind):
    """Through worker processes, networks and storage; seconds are for a machine that is busy with other tests."""
    outcome = fuzz[1].run_pipeline(kind, CASES, seed=1, timeout_seconds=60)
    assert outcome.num_failures == 0, fuzz[1].report(outcome)
    assert sum(outcome.counts.values()) == CASES
    assert {given for given, _ in outcome.counts} >= {"rows", "reason"}
    assert outcome.num_rows > 5


def test_what_must_not_happen_counts_as_a_failure(fuzz, tmp_path):
    """Else a clean result would say nothing."""
    from preprocessing.ledger import Outcome

    path = tmp_path / "00001-truncated.mp4"
    bad = ("unusable", f"{path}: KeyError: 12"), ("crashed", "its worker ended with code -11"), ("timeout", "20 s")
    assert [fuzz[1]._fate(path, outcome(path, *record)) for record in bad] == [
        ("reason", "unusable: FILE: KeyError: N"), ("reason", "crashed: its worker ended with code -N"),
        ("reason", "timeout: N s"),
    ]  # fmt: skip
    fates = [fuzz[1]._fate(path, outcome(path, *record)) for record in bad] + [fuzz[1]._fate(path, None)]
    nothing = Outcome(key=str(path), num_clips=0, rejected=[], seconds=1.0, time=0.0)
    fates += [fuzz[1]._fate(path, nothing), ("rows", "unsound rows: clip a is there twice"), ("job", "exit code 1")]
    fine = [fuzz[1]._fate(path, outcome(path, "unreadable", "damaged")), ("rows", "all of it")]
    counted = fuzz[1].PipelineOutcome(
        counts=fuzz[0].collections.Counter(fates + fine), num_rows=1, seconds=1.0, slowest_seconds=1.0
    )
    assert counted.num_failures == len(fates) == 7


def outcome(path, reason, detail):
    from preprocessing.ledger import Outcome
    from preprocessing.worker import record

    return Outcome(key=str(path), num_clips=0, rejected=[record(str(path), reason, detail)], seconds=1.0, time=0.0)


def test_a_crash_and_a_hang_are_counted(fuzz, tmp_path):
    missing = tmp_path / "absent.mp4"
    with fuzz[0].Worker() as worker:
        assert worker.read(missing, 60) == ("reason", "FILE: no such file")
        os.kill(worker.process.pid, signal.SIGSEGV)
        worker.process.wait()
        assert worker.read(missing, 60) == ("crash", f"exit status {-signal.SIGSEGV}")
        assert worker.read(missing, 60)[0] == "reason"
        os.kill(worker.process.pid, signal.SIGSTOP)
        assert worker.read(missing, 0.5) == ("hang", "longer than 0.5 s")
        assert worker.read(missing, 60)[0] == "reason"


def test_every_kind_of_damage_changes_the_file(fuzz, tmp_path):
    from damaged_videos import DAMAGES, damaged, make_sources

    sources = make_sources(tmp_path)
    originals = [path.read_bytes() for path in sources]
    seen = set()
    for number, (name, data) in enumerate(damaged(sources, 60, 0)):
        seen.add(name)
        assert data != originals[number % len(sources)]
    assert seen == set(DAMAGES)
    assert [data for _, data in damaged(sources, 9, 3)] == [data for _, data in damaged(sources, 9, 3)]
