"""The benchmark of the training step: runs on tiny slices, claims nothing there, and its sums are right."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_step


def test_tiny_slices_run_and_claim_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--variants", "ti2v-5b", "--methods", "full", "--policies", "attention", "--repeats", "1"]
    assert train_step.main([*options, "--out", str(tmp_path / "rows.json")]) == 0
    assert "no figures are claimed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["fp8"], row["note"]) for row in rows] == [(False, "ran"), (True, "ran")]
    assert not any(key in row for row in rows for key in ("ms", "ratio", "tflops"))


def test_shapes_are_those_of_the_bars() -> None:
    assert [row.num_tokens for row in train_step.SLICES] == [32760, 27280]


def test_sums() -> None:
    a14b = train_step.SLICES[0]
    timed = train_step.Timed(
        seconds=1.0, peer_seconds=1.5, saved_bytes=4 * 0.95 * train_step.GIB, loss=1.0
    )
    figures = train_step.figures(a14b, "lora", timed)
    assert figures["ratio"] == 1.5 and figures["saved_gib_a_layer"] == 0.95
    # 28.1 GB of frozen bf16 weights on 8 GPUs, two gathered layers, 40 x 0.95 GiB over 4 ranks.
    assert figures["full_model_gib"] == pytest.approx(3.3 + 1.3 + 9.5, abs=0.3) and figures["fits_80_gib"]
    assert figures["whole_job_ratio_with_quoted_encoders"] == pytest.approx((15 + 1.383) / (10 + 0.1383), abs=0.001)


def test_unequal_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = train_step.torch.device("cpu")
    peer, ours, inputs = train_step.build(train_step.SLICES[0], "full", device, True)
    ours.head.head.weight.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="losses differ"):
        train_step.compare(peer, ours, inputs, fp8=False, repeats=1, device=device)
