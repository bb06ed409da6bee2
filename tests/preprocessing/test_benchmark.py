"""benchmarks/preprocess.py: its clocks, its comparison, and a run of it on a few frames."""

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import DEMO, MODELS, part_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from original_way import OriginalWay  # noqa: E402  (found through the path set above)
from our_way import OurWay  # noqa: E402
from same_outputs import agree  # noqa: E402
from stage_times import NETWORK, Stopwatch  # noqa: E402

from preprocessing.settings import Settings  # noqa: E402

CPU = {"provider": "cpu", "num_threads": 2}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    return part_of("walker.mp4", tmp_path_factory.mktemp("videos") / "short.mp4", range(11))


def test_a_stage_inside_another_counts_once_and_overlapping_networks_once():
    watch = Stopwatch()
    with watch.measure() as measured, watch.stage("outer"):
        threads = [threading.Thread(target=watch.counted(lambda: time.sleep(0.2), NETWORK)) for _ in range(2)]
        for thread in threads:
            thread.start()
        with watch.stage("inner"):
            time.sleep(0.3)
        for thread in threads:
            thread.join()
    (times,) = measured
    assert times.stages["inner"][0] >= 0.3
    assert times.stages["outer"][0] + times.stages["inner"][0] == pytest.approx(times.wall, rel=0.02)
    assert times.stages[NETWORK][0] >= 0.4  # of two threads
    assert 0.2 <= times.network <= times.stages[NETWORK][0] - 0.1
    assert times.outside == times.wall - times.network


def test_outputs_that_differ_are_noticed(short, tmp_path, capsys):
    settings = Settings(profile="upstream", num_frames=5)
    expected = OriginalWay(MODELS, Stopwatch(), area=settings.area, **CPU)(short, DEMO / "reference/man.png", tmp_path)
    rows = OurWay(MODELS, Stopwatch(), settings, **CPU).rows(short)
    assert len(rows) == 2 and agree("short", rows, expected)
    assert {path.name for path in tmp_path.iterdir()} == {
        "src_bg.mp4", "src_face.mp4", "src_mask.mp4", "src_pose.mp4", "src_ref.png",
    }  # fmt: skip
    capsys.readouterr()
    moved = dataclasses.replace(expected, keypoints=expected.keypoints + 0.05)
    assert not agree("short", rows, moved)
    assert "key points, pixels: DIFFERENT; 0.000% within 0.02" in capsys.readouterr().out
    assert not agree("short", rows, dataclasses.replace(expected, masks=~expected.masks))


def test_the_script_prints_stages_and_figures_of_both(short):
    command = [sys.executable, str(BENCHMARKS / "preprocess.py"), "--num-frames=5", "--repeats=1", f"--videos={short}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # a busy machine may miss a target
    peer, ours = done.stdout.split("the original's way")[1].split("ours (stages overlap)")
    assert "pose: heat maps" in peer and "write 4 mp4 (x264 medium)" in peer and "hash" not in peer
    for stage in ("hash", "probe", "shots", "tracking", "quality", "encode 2 mp4", "write rows", "commit", "networks"):
        assert f"  {stage}" in ours
    for figure in ("outside networks / wall, ours", "outside networks, ours / peer"):
        assert f"{figure}: 0." in ours
