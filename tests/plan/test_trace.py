"""Activations and temporaries: traced on shallow models, beside whole simulations and what was measured on a GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_accel.assemble import Techniques
from wan_accel.draws import Bucket
from wan_accel.lora import LoraSettings
from wan_accel.models.variants import VARIANTS
from wan_accel.plan.ask import units_of_skeleton
from wan_accel.plan.formula import Load, Trained, peak_of
from wan_accel.plan.layout import Layout
from wan_accel.plan.memory import TrackMemory
from wan_accel.plan.simulate import Task, simulate
from wan_accel.plan.trace import MicroStep, first_layers, trace
from wan_accel.plan.verdict import GIB
from wan_accel.plan.weights import ModelShapes, released_shapes

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_memory

SHAPES = {"t2v-a14b": Bucket(81, 480, 832), "ti2v-5b": Bucket(121, 704, 1280), "i2v-14b-480p": Bucket(81, 480, 832)}
ONE = Layout(engine="fsdp2", world_size=8)


def step_for(variant: str, policy: Any, **techniques: Any) -> MicroStep:
    row = VARIANTS[variant]
    return MicroStep(
        variant=row, shapes=released_shapes(row), bucket=SHAPES[variant], num_samples=1,
        techniques=Techniques(activation_checkpointing=policy, **techniques),
    )  # fmt: skip


# GiB a layer, as the guide says them (docs/TRAINING.md, Memory and speed).
@pytest.mark.parametrize(
    ("variant", "policy", "expected"),
    [
        ("t2v-a14b", "full", 0.31),
        ("ti2v-5b", "full", 0.16),
        ("t2v-a14b", "attention", 0.95),
        ("ti2v-5b", "attention", 0.47),
    ],
)
def test_what_a_layer_keeps(variant: str, policy: str, expected: float) -> None:
    assert trace(step_for(variant, policy), ONE).layer / GIB == pytest.approx(expected, abs=0.006)


def test_exchanges_are_kept_and_divided() -> None:
    """7 units of 0.31 GiB over the degree: input, both attentions, and q, k, v and output of the exchanges."""
    found = trace(step_for("t2v-a14b", "attention"), Layout(engine="fsdp2", world_size=8, ulysses=4))
    assert found.layer / GIB == pytest.approx(7 * 0.3124 / 4, rel=0.02)
    again = trace(step_for("t2v-a14b", "attention"), Layout(engine="fsdp2", world_size=8, ulysses=8))
    assert again.layer == pytest.approx(found.layer / 2, rel=0.01)
    assert again.working == pytest.approx(found.working / 2, rel=0.05)


def test_compiled_blocks_keep_what_was_measured() -> None:
    """6.71 GiB a layer on an H100 (docs/TRAINING.md, torch 2.11); a budget keeps its share of that."""
    none = trace(step_for("t2v-a14b", "none", compile=True), ONE)
    assert none.layer / GIB == pytest.approx(6.71, rel=0.1)
    half = trace(step_for("t2v-a14b", 0.5, compile=True), ONE)
    assert 0.4 * none.layer < half.layer < 0.65 * none.layer


def test_compiled_blocks_work_with_what_is_not_fused() -> None:
    """They keep the same, and need a fraction of what the same operators need one by one."""
    eager = trace(step_for("t2v-a14b", "attention"), ONE)
    compiled = trace(step_for("t2v-a14b", "attention", compile=True), ONE)
    assert compiled.layer == pytest.approx(eager.layer, rel=0.01) and compiled.around == eager.around
    assert compiled.working < 0.3 * eager.working


def test_8_bit_inputs_are_kept_in_8_bits() -> None:
    plain = trace(step_for("t2v-a14b", "none"), ONE)
    fp8 = trace(step_for("t2v-a14b", "none", fp8=True), ONE)
    assert fp8.layer < 0.99 * plain.layer


@pytest.mark.parametrize(
    ("variant", "method", "policy", "layout"),
    [
        ("t2v-a14b", "full", "attention", Layout(engine="fsdp2", world_size=64)),
        ("ti2v-5b", "full", "none", Layout(engine="hsdp", world_size=16, dp_replicate=2)),
        ("i2v-14b-480p", "lora", "attention", Layout(engine="fsdp2", world_size=8, ulysses=4)),
    ],
)
def test_formula_and_simulation_agree(variant: str, method: str, policy: str, layout: Layout) -> None:
    """On models of a few layers, to 5%; what is kept to 0.1%."""
    row, num_layers = VARIANTS[variant], 5
    shapes = first_layers(released_shapes(row), num_layers)
    lora = LoraSettings(r=32) if method == "lora" else None
    techniques = Techniques(
        lora=lora, torch_dtype=torch.bfloat16 if lora else torch.float32, activation_checkpointing=policy  # type: ignore
    )
    found = simulate(
        Task(
            variant=row, shapes=shapes, techniques=techniques, layout=layout, bucket=SHAPES[variant], num_samples=1,
            optim="adamw_torch_fused", optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True),
        )
    )  # fmt: skip
    step = trace(
        MicroStep(variant=row, shapes=shapes, techniques=techniques, bucket=SHAPES[variant], num_samples=1), layout
    )
    assert step.kept(num_layers) == pytest.approx(found.kept, rel=1e-3)
    units = units_of_skeleton(row, shapes, techniques)
    peak = peak_of(units, layout, Trained(optim="adamw_torch_fused"), step, Load(num_layers=num_layers))
    assert peak.total == pytest.approx(sum(found.peak.values()), rel=0.05)


def test_autocast_copies_weights_where_one_process_computes_in_bf16() -> None:
    sharded = trace(step_for("ti2v-5b", "none"), ONE)
    alone = trace(step_for("ti2v-5b", "none"), Layout(engine="single", world_size=1))
    copies = 2 * sum(weight.numel for unit in block_of("ti2v-5b") for weight in unit.weights)
    assert alone.layer - sharded.layer == pytest.approx(copies, rel=0.1)


def block_of(variant: str) -> tuple[Any, ...]:
    row = VARIANTS[variant]
    return units_of_skeleton(row, first_layers(released_shapes(row), 1), Techniques())[:1]


def test_first_layers_keep_their_face_blocks() -> None:
    names = {"blocks.0.a": (1,), "blocks.5.a": (1,), "blocks.6.a": (1,), "head.head.weight": (1,)}
    names |= {f"face_adapter.fuser_blocks.{number}.b": (1,) for number in (0, 1, 2)}
    found = first_layers(ModelShapes(folder=Path("x"), shapes=names, num_heads=1), 6)
    assert set(found.shapes) == set(names) - {"blocks.6.a", "face_adapter.fuser_blocks.2.b"}


def test_memory_by_hand() -> None:
    memory = TrackMemory()
    with memory:
        kept = torch.zeros(100)  # 400 bytes
        with memory.counted_as("optimizer"):
            state = torch.zeros(50)
        view = kept[10:]
        double = view * 2  # 360 bytes
        assert (memory.live["other"], memory.live["optimizer"]) == (760, 200)
        del double, view
        assert memory.live.total() == 600 and memory.peak.total() == 960
        memory.restart_peak()
        with memory.hidden():
            fused = kept + 1
        assert memory.peak.total() == 600
        state.untyped_storage().resize_(0)
        assert memory.live["optimizer"] == 0 and memory.live["other"] == 400
    del kept, fused
    assert memory.live.total() == 0
    assert torch.zeros(3).untyped_storage().resize_(0).nbytes() == 0  # as torch has it, again


def test_the_comparison_with_a_gpu_claims_nothing_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows say what the trace says; a row of a GPU's that is off by more than 10% is a failure."""
    options = ["--variants", "t2v-a14b", "--methods", "full", "--policies", "full", "--layers", "2"]
    assert plan_memory.main([*options, "--out", str(tmp_path / "rows.json")]) == 0
    (found,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert found["note"] == "no GPU: not compared" and not {"peak_gib", "error", "close"} & set(found)
    assert found["planned_kept_gib"] > 2 * 0.31 and found["planned_peak_gib"] > found["planned_kept_gib"]
    peak = found["planned_peak_gib"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    for measured, code in ((0.95 * peak, 0), (0.85 * peak, 1)):
        monkeypatch.setattr(plan_memory, "planned", lambda *_: {"planned_peak_gib": peak})
        monkeypatch.setattr(plan_memory, "allocated", lambda *_, m=measured: {"peak_gib": m})
        assert plan_memory.main(options) == code
