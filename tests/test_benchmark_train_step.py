"""The benchmark of the training step: runs on tiny slices, claims nothing there, and its sums are right."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_encoders
import step_figures
import step_slices
import step_timing
import train_step
from step_figures import GIB
from step_timing import Saved, Timed

CPU = torch.device("cpu")
A14B, TI2V, ANIMATE = step_slices.SLICES


def test_tiny_slices_run_and_claim_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--variants", "ti2v-5b", "--methods", "full", "--policies", "attention", "--repeats", "1"]
    assert train_step.main([*options, "--out", str(tmp_path / "rows.json")]) == 0
    assert "no figures are claimed" in capsys.readouterr().out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["fp8"], row["note"]) for row in found["rows"]] == [(False, "ran"), (True, "ran")]
    assert not any(key in row for row in found["rows"] for key in ("ms", "ratio", "tflops")) and not found["summary"]


@pytest.mark.parametrize("slice_", [TI2V, ANIMATE], ids=lambda slice_: slice_.variant)
def test_both_sides_compute_the_same(slice_: step_slices.Slice) -> None:
    peer, ours, inputs = step_slices.build(slice_, "lora", CPU, True)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs), peer(**inputs), rtol=1e-4, atol=1e-4)
        if slice_ is TI2V:  # the first frame is clean on both
            assert not torch.allclose(ours(**inputs), ours(**{**inputs, "first_frame_timestep": inputs["timestep"]}))
    timed = step_timing.compare(slice_, peer, ours, inputs, fp8=False, repeats=1, device=CPU)
    assert timed.peer_shallow_seconds > 0 and timed.shallow_seconds > 0  # of fewer layers, which are put back
    assert len(ours.blocks) == len(peer.dit.blocks) == slice_.num_layers


def test_animate_has_all_encoders() -> None:
    times = step_encoders.encoder_seconds(ANIMATE, CPU, True)
    assert list(times) == ["text", "video", "pose", "face", "clip"]


def test_shapes_are_those_of_the_bars() -> None:
    assert [slice_.num_tokens for slice_ in step_slices.SLICES] == [32760, 27280, 33600]
    assert [slice_.video for slice_ in step_slices.SLICES] == [(81, 480, 832), (121, 704, 1280), (77, 640, 640)]


def test_peer_and_ours_take_turns() -> None:
    order: list[str] = []
    step_timing.in_turns(lambda: order.append("peer"), lambda: order.append("ours"), 3, CPU)
    assert order == ["peer", "ours"] * 3


def test_out_holds_the_rows_so_far_and_those_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 60 s and 4 minutes: the fourth would end at the deadline, and is listed like those behind it."""
    clock = itertools.count(step=60.0)
    files: list[list[Any]] = []
    out = tmp_path / "rows.json"

    def measure(case: train_step.Case, encoders: object, **_: object) -> dict[str, Any]:
        files.append(json.loads(out.read_text())["rows"] if out.exists() else [])
        return {**case.name, "note": "ran"}

    monkeypatch.setattr(train_step, "measure", measure)
    monkeypatch.setattr(train_step, "encoder_seconds", lambda *_: {})
    monkeypatch.setattr(train_step.time, "monotonic", lambda: next(clock))
    train_step.main(["--variants", "t2v-a14b", "--minutes", "8.5", "--out", str(out)])
    notes = [row["note"] for row in json.loads(out.read_text())["rows"]]
    assert notes == ["ran"] * 3 + ["not run: no time"] * 9
    assert [len(rows) for rows in files] == [0, 1, 2] and not list(tmp_path.glob("*.part"))


def timed(saved_gib_a_layer: float) -> Timed:
    saved = Saved(layers=4 * saved_gib_a_layer * GIB, around=0.8 * GIB, working=8 * GIB)
    return Timed(seconds=1.0, peer_seconds=1.5, shallow_seconds=0.25, peer_shallow_seconds=0.3, saved=saved)


def test_sums() -> None:
    encoders = {"text": 0.043, "video": 1.34}
    figures = step_figures.figures(A14B, "lora", "attention", timed(0.95), encoders)
    assert figures["ratio"] == 1.5 and figures["saved_gib_a_layer"] == 0.95
    # 28 GB of frozen bf16 weights and adapters on 8 GPUs, two gathered layers and what lies around them; over 4 ranks:
    # 40 layers of 0.95 GiB and of 4 x 0.31 GiB from the exchanges, what lies around them, what a layer works with.
    expected = 3.4 + 1.8 + (40 * (0.95 + 4 * 0.3124) + 0.8 + 8) / 4
    assert figures["full_model_gib"] == pytest.approx(expected, abs=0.5) and figures["fits_80_gib"]
    assert figures["fits_80_gib_from_ulysses"] == 1
    # 40 layers: one of the shallow slice, and 39 thirds of what the other three cost.
    assert (figures["step_s"], figures["diffsynth_step_s"]) == (10.0, 15.9)
    assert figures["whole_job_ratio"] == pytest.approx((15.9 + 1.383) / (10 + 0.1383), abs=0.001)
    without = step_figures.figures(A14B, "lora", "attention", timed(0.95), "text: out of memory")
    assert without["whole_job_ratio"] == "not measured: text: out of memory"


def test_parameters_are_those_of_the_models() -> None:
    """The matrices; biases, norms and modulation are below 0.1%."""
    for slice_, millions in ((A14B, 14288), (TI2V, 5000), (ANIMATE, 16395 + 839)):
        size = slice_.row.dit
        total = size.num_layers * step_figures.layer_parameters(size) + step_figures.other_parameters(slice_)
        assert total / 1e6 == pytest.approx(millions, rel=2e-3)


def test_what_fits() -> None:
    dear = timed(6.71).saved
    assert step_figures.least_ulysses(A14B, "lora", "none", dear) == 8  # 40 x 6.7 GiB over 4 would be 67 and more
    assert step_figures.least_ulysses(A14B, "lora", "none", timed(40.0).saved) is None
    rows = [
        {"variant": "a", "method": "lora", "fp8": False, "policy": policy, "ratio": ratio, "fits_80_gib": fits,
         "num_gpus": 8, "ulysses": 4, "full_model_gib": 1.0, "whole_job_ratio": 1.2}
        for policy, ratio, fits in (("none", 1.5, False), ("attention", 1.3, True), ("full", 1.1, True))
    ]  # fmt: skip
    (line,) = step_figures.summary([*rows, {"variant": "a", "method": "lora", "fp8": True, "note": "out of memory"}])
    assert (line["ceiling_ratio"], line["deployable_ratio"], line["policy"]) == (1.5, 1.3, "attention")


def test_unequal_losses_are_not_timed() -> None:
    peer, ours, inputs = step_slices.build(A14B, "full", CPU, True)
    ours.head.head.weight.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="losses differ"):
        step_timing.compare(A14B, peer, ours, inputs, fp8=False, repeats=1, device=CPU)
