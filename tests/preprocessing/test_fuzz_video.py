"""Damaged videos end in frames or in a reason; the full count runs with benchmarks/fuzz_videos.py."""

import importlib.util
import os
import signal
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/fuzz_videos.py"


def load_script():
    spec = importlib.util.spec_from_file_location("fuzz_videos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_videos_neither_crash_nor_hang():
    counts, longest = load_script().run(42, seed=0, timeout_seconds=30)
    assert sum(counts.values()) == 42
    assert {kind for kind, _ in counts} == {"frames", "reason"}, counts
    assert longest < 30


def test_a_crash_and_a_hang_are_counted(tmp_path):
    """Else a clean result would say nothing."""
    missing = tmp_path / "absent.mp4"
    with load_script().Worker() as worker:
        assert worker.read(missing, 60) == ("reason", "FILE: no such file")
        os.kill(worker.process.pid, signal.SIGSEGV)
        worker.process.wait()
        assert worker.read(missing, 60) == ("crash", f"exit status {-signal.SIGSEGV}")
        assert worker.read(missing, 60)[0] == "reason"
        os.kill(worker.process.pid, signal.SIGSTOP)
        assert worker.read(missing, 0.5) == ("hang", "longer than 0.5 s")
        assert worker.read(missing, 60)[0] == "reason"


def test_every_kind_of_damage_changes_the_file(tmp_path):
    fuzz = load_script()
    sources = fuzz.make_sources(tmp_path)
    originals = [path.read_bytes() for path in sources]
    seen = set()
    for number, (name, data) in enumerate(fuzz.damaged(sources, 60, 0)):
        seen.add(name)
        assert data != originals[number % len(sources)]
    assert seen == set(fuzz.DAMAGES)
    assert [data for _, data in fuzz.damaged(sources, 9, 3)] == [data for _, data in fuzz.damaged(sources, 9, 3)]
