"""benchmarks/fp8_curve.py: a run of few steps, and its sums."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from ranks import run_ranks
from tiny_clips import clip_row, write_clips

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fp8_curve


def run(folder: str) -> int:
    return fp8_curve.main(["--steps=3", "--window=2", "--methods", "lora", "--folder", folder])


def test_three_runs_differ_by_their_rounding_only(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", [clip_row(number) for number in range(4)])
    assert run_ranks(run, 1, str(tmp_path), engine="single") == [0]
    found = json.loads((tmp_path / "fp8_curve.json").read_text())
    assert "emulation" in found["device"] and found["lora"]["first_and_last"].keys() == fp8_curve.WAYS.keys()
    for gap in ("fp8_over_bf16", "bf16_over_fp32"):  # at the start of a LoRA, of small weights
        assert 0 < abs(found["lora"][gap]["largest_percent"]) < 1, gap
    with Image.open(tmp_path / "fp8_curve.png") as picture:
        assert picture.width > 600 and picture.height > 600


def test_gaps_of_smoothed_losses() -> None:
    base, other = [2.0, 2.0, 4.0, 4.0], [2.0, 2.2, 4.4, 3.8]
    assert fp8_curve.smoothed(base, 2) == [2.0, 3.0, 4.0]
    gap = fp8_curve.measure(base, other, 2)
    assert (gap.largest_percent, gap.at_step, gap.last_percent) == (pytest.approx(10.0), 3, pytest.approx(2.5))
    with pytest.raises(RuntimeError, match="computed in the same precision"):
        fp8_curve.measure(base, base, 2)
