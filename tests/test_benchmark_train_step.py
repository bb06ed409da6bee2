"""The benchmark of the training step: runs on tiny slices, claims nothing there, and its sums are right."""

import itertools
import json
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from synthetic import tiny_denoiser

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_encoders
import step_figures
import step_slices
import step_timing
import train_step
from step_figures import GIB
from step_timing import Saved, Timed

from wan_accel.models import fp8
from wan_accel.models.attention import CudnnAttention
from wan_accel.parallel.collectives import reduce_scatter_single
from wan_accel.parallel.fsdp import fully_shard_denoiser, shard_units
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.plugins import fsdp2_plugin
from wan_accel.plan.weights import total

CPU = torch.device("cpu")
A14B, TI2V, ANIMATE = step_slices.SLICES


def test_tiny_slices_run_and_claim_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--variants", "ti2v-5b", "--methods", "full", "--policies", "attention", "--repeats", "1"]
    assert train_step.main([*options, "--out", str(tmp_path / "rows.json")]) == 0
    assert "no figures are claimed" in capsys.readouterr().out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["fp8"], row["attention"], row["note"]) for row in found["rows"]] == [
        (False, "sdpa", "ran"), (True, "sdpa", "ran"),
    ]  # fmt: skip
    claims = {"ms", "ratio", "tflops", "of_matrix_tflops", "matrix_tflops"}
    assert not any(claims & row.keys() for row in [found, *found["rows"]]) and not found["summary"]
    plain, eighth = found["rows"]
    assert 0 < eighth["fp8_velocity_gap"] < 0.02 and "fp8_velocity_gap" not in plain


def test_attention_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture) -> None:
    assert train_step.main(["--attention", "flash_3"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: model.attention=flash_3 needs an NVIDIA GPU") and not told.out


def test_attention_is_put_into_our_blocks_and_the_peers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[type] = []

    def compare(slice_: Any, peer: Any, ours: Any, *_: Any, **__: Any) -> None:
        kernels.extend(type(block.self_attn.attn) for block in ours.blocks)

    monkeypatch.setattr(train_step, "compare", compare)  # the kernel itself needs a GPU
    case = train_step.Case(slice_=TI2V, method="full", policy="full", fp8=False, attention="cudnn")
    assert train_step.measure(case, {}, device=CPU, repeats=1, matrix_tflops=1.0)["attention"] == "cudnn"
    assert kernels == [CudnnAttention] * TI2V.num_layers
    assert step_slices.peer_attention() == "sdpa"
    monkeypatch.setattr(step_slices.wan_video_dit, "FLASH_ATTN_3_AVAILABLE", True)
    assert step_slices.peer_attention() == "flash_3"


def test_fp8_that_is_wrong_or_not_there_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth too much in every product, which the loss hides."""
    case = train_step.Case(slice_=A14B, method="full", policy="none", fp8=True)
    exact = fp8.scaled_product
    monkeypatch.setattr(train_step, "compare", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(fp8, "scaled_product", lambda *args, **options: 1.2 * exact(*args, **options))
    row = train_step.measure(case, {}, device=CPU, repeats=1, matrix_tflops=1.0)
    assert re.fullmatch(r"fp8: the velocity is \d\.\d% off, at most 3\.0% is rounding; not timed", row["note"])
    same = torch.ones(3)
    with pytest.raises(RuntimeError, match="nothing was computed in fp8"):
        step_timing.fp8_gaps(same, same.clone())


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
    """Encoders and rows of 60 s: the fourth row would end at the deadline, and is listed like those behind it."""
    clock = itertools.count(step=60.0)
    files: list[list[Any]] = []
    out = tmp_path / "rows.json"

    def measure(case: train_step.Case, encoders: object, **_: object) -> dict[str, Any]:
        files.append(json.loads(out.read_text())["rows"] if out.exists() else [])
        return {**case.name, "note": "ran"}

    monkeypatch.setattr(train_step, "measure", measure)
    monkeypatch.setattr(train_step, "encoder_seconds", lambda *_: {})
    monkeypatch.setattr(train_step.time, "monotonic", lambda: next(clock))
    train_step.main(["--variants", "t2v-a14b", "--minutes", "11.5", "--out", str(out)])
    notes = [row["note"] for row in json.loads(out.read_text())["rows"]]
    assert notes == ["ran"] * 3 + ["not run: no time"] * 9
    assert [len(rows) for rows in files] == [0, 1, 2] and not list(tmp_path.glob("*.part"))


def test_encoders_leave_time_for_a_row_or_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders take 5 minutes, rows 2, and after 9 of 16 minutes another slice's encoders and row would be too late."""
    now, ran = [0.0], []

    def work(minutes: float, result: Any) -> Any:
        ran.append(minutes)
        now[0] += 60 * minutes
        return result

    monkeypatch.setattr(train_step.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_step, "encoder_seconds", lambda *_: work(5, {}))
    monkeypatch.setattr(train_step, "measure", lambda case, *_, **__: work(2, {**case.name, "note": "ran"}))
    cases = [train_step.Case(slice_=s, method="lora", policy="full", fp8=False) for s in (A14B, A14B, TI2V, ANIMATE)]
    deadline = train_step.Deadline(at=16 * 60 - 1)
    notes = [row["note"] for row in train_step.rows(cases, deadline, device=CPU, repeats=1, matrix_tflops=1.0)]
    assert notes == ["ran", "ran", "not run: no time", "not run: no time"] and ran == [5, 2, 2]
    now[0], ran[:] = 0.0, []
    deadline = train_step.Deadline(at=6 * 60, longest={"row": 120})  # the first encoders take longer than anyone knew
    notes = [row["note"] for row in train_step.rows(cases[:1], deadline, device=CPU, repeats=1, matrix_tflops=1.0)]
    assert notes == ["not run: no time"] and ran == [5]


def timed(saved_gib_a_layer: float) -> Timed:
    saved = Saved(layers=4 * saved_gib_a_layer * GIB, around=0.8 * GIB, working=8 * GIB)
    return Timed(seconds=1.0, peer_seconds=1.5, shallow_seconds=0.25, peer_shallow_seconds=0.3, saved=saved)


def test_sums() -> None:
    encoders = {"text": 0.043, "video": 1.34}
    figures = step_figures.figures(A14B, "lora", "attention", timed(0.95), encoders, matrix_tflops=800.0)
    assert figures["ratio"] == 1.5 and figures["saved_gib_a_layer"] == 0.95
    assert figures["of_matrix_tflops"] == pytest.approx(figures["tflops"] / 800, abs=1e-3)
    # 28 GB of frozen bf16 weights and adapters on 8 GPUs, two gathered layers and what lies around them; over 4 ranks:
    # 40 layers of 0.95 GiB and of 4 x 0.31 GiB from the exchanges, what lies around them, what a layer works with.
    expected = 3.4 + 1.8 + (40 * (0.95 + 4 * 0.3124) + 0.8 + 8) / 4
    assert figures["full_model_gib"] == pytest.approx(expected, abs=0.5) and figures["fits_80_gib"]
    assert figures["fits_80_gib_from_ulysses"] == 1
    # 40 layers: one of the shallow slice, and 39 thirds of what the other three cost.
    assert (figures["step_s"], figures["diffsynth_step_s"]) == (10.0, 15.9)
    assert figures["whole_job_ratio"] == pytest.approx((15.9 + 1.383) / (10 + 0.1383), abs=0.001)
    without = step_figures.figures(A14B, "lora", "attention", timed(0.95), "text: out of memory", matrix_tflops=800.0)
    assert without["whole_job_ratio"] == "not measured: text: out of memory"


class Buffers:
    """Reduces gradients as FSDP2 does, and notes what it is given: dtype, elements, and how many before still live."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.dtype, int, int]] = []
        self.given: list[weakref.ref] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        alive = sum(reference() is not None for reference in self.given)
        self.seen.append((input_tensor.dtype, input_tensor.numel(), alive))
        self.given.append(weakref.ref(input_tensor))
        return reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def reduced() -> tuple[list[tuple[torch.dtype, int, int]], list[int]]:
    """What FSDP2 reduces in the backward pass of a full step in bf16; elements of the units, the root's last."""
    torch.distributed.init_process_group("gloo")
    model, buffers = tiny_denoiser("t2v-1.3b"), Buffers()
    units = [*shard_units(model), model]
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units]
    fully_shard_denoiser(model, fsdp2_plugin("t2v-1.3b"), ParallelDims(world_size=2).shard_mesh("cpu"))
    for unit in units:
        unit.set_custom_reduce_scatter(buffers)
    out = model(torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), text=torch.randn(1, 5, 24))
    out.float().square().mean().backward()
    return buffers.seen, [*sizes[:-1], sizes[-1] - sum(sizes[:-1])]


def test_full_training_reduces_a_layer_at_a_time_in_fp32() -> None:
    """Which is what `full_model_gib` counts, and that a layer's is larger than that of what lies around them."""
    seen, sizes = run_ranks(reduced, 2, engine="fsdp2-bf16")[0]
    assert [dtype for dtype, _, _ in seen] == [torch.float32] * 3 and [alive for _, _, alive in seen] == [0] * 3
    for (_, found, _), size in zip(seen, [*sizes[-2::-1], sizes[-1]]):  # blocks from the last to the first, the root
        assert size <= found < 1.02 * size  # odd first dims are padded
    for slice_ in (A14B, TI2V):
        *blocks, root = (total(unit.weights) for unit in step_figures.units(slice_.variant, "full"))
        assert max(blocks) > root
    full, lora = (
        step_figures.full_model_gib(A14B, method, "attention", timed(0.95).saved, ulysses=4)
        for method in ("full", "lora")
    )
    # Training state, sharded over 32 GPUs and not frozen over 8, where adapters have theirs; the buffer of a layer.
    expected = (14.29e9 * (16 / 32 - 2 / 8) - 0.3e9 + 4 * 351e6) / GIB
    assert full - lora == pytest.approx(expected, abs=0.1)


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
