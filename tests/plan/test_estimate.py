"""Estimates: what is left out of traces for speed, experts and encoders on top."""

from dataclasses import replace
from pathlib import Path

import pytest

from wan_accel.draws import Bucket
from wan_accel.models.variants import VARIANTS
from wan_accel.plan.ask import Ask
from wan_accel.plan.encoders import encoder_bytes, encoding_bytes
from wan_accel.plan.estimate import Planner
from wan_accel.plan.layout import Layout
from wan_accel.plan.trace import MicroStep, first_layers, trace
from wan_accel.plan.verdict import GIB
from wan_accel.plan.weights import released_shapes
from wan_accel.recipe.load import load_recipe

BUCKET = Bucket(81, 480, 832)
NOWHERE = Path("/nowhere")


def ask_for(recipe: str, *overrides: str, ulysses: int = 1, num_layers: int = 6, world_size: int = 8) -> Ask:
    changes = [f"model.checkpoint={NOWHERE}", f"parallel.ulysses={ulysses}", "memory.compile=false", *overrides]
    loaded = load_recipe(recipe, changes)
    shapes = first_layers(released_shapes(VARIANTS[loaded.variant]), num_layers)
    layout = Layout(engine="fsdp2", world_size=world_size, ulysses=ulysses)
    return Ask(recipe=loaded, layout=layout, shapes=shapes, clips={BUCKET: 1})


@pytest.mark.parametrize(("recipe", "policy"), [("t2v-a14b/full", "attention"), ("i2v-14b-480p/lora", "none")])
def test_high_ulysses_degrees_are_scaled_from_low_ones(recipe: str, policy: str) -> None:
    expert = ["model.expert=high"] if recipe.startswith("t2v-a14b") else []
    ask = ask_for(recipe, f"memory.activation_checkpointing={policy}", *expert, ulysses=8)
    scaled = Planner(ask, ()).step_memory(ask)
    step = MicroStep(
        variant=ask.variant, shapes=ask.shapes, techniques=ask.techniques, bucket=ask.batches.bucket, num_samples=1
    )
    direct = trace(step, ask.layout)
    assert scaled.layer == pytest.approx(direct.layer, rel=0.02)
    assert scaled.kept(40) == pytest.approx(direct.kept(40), rel=0.02)
    assert scaled.working == pytest.approx(direct.working, rel=0.1)


def test_both_experts_of_a_pair_are_in_memory() -> None:
    one, pair = (ask_for("t2v-a14b/lora", f"model.expert={expert}", num_layers=3) for expert in ("high", "both"))
    planner = Planner(one, ())
    for estimate in (planner.by_formula, planner.by_simulation):
        single, double = estimate(one), estimate(pair)
        assert double.fixed.parameters == 2 * single.fixed.parameters
        assert double.fixed.optimizer == 2 * single.fixed.optimizer
        assert double.peak.parameters == pytest.approx(2 * single.peak.parameters)
        assert double.peak.activations == single.peak.activations
        assert double.disk.checkpoint == 2 * single.disk.checkpoint
        assert not one.accumulates and pair.accumulates  # a mixed step has gradients of both


def test_formula_and_simulation_say_the_same() -> None:
    ask = ask_for("t2v-a14b/full", "model.expert=high", "method.ema={decay: 0.999}")
    planner = Planner(ask, ())
    by_formula, simulated = planner.by_formula(ask), planner.by_simulation(ask)
    assert simulated.fixed.ema == by_formula.fixed.ema > 0
    assert simulated.traffic == by_formula.traffic
    assert simulated.peak.total == pytest.approx(by_formula.peak.total, rel=0.05)
    assert replace(simulated.disk, staged=0) == replace(by_formula.disk, staged=0)
    assert simulated.disk.staged == pytest.approx(by_formula.disk.staged, rel=1e-3)


def test_encoders_on_the_fly() -> None:
    """VAE 2.1 has 127 M parameters and is whole on every rank; umT5 has 5.68 B and is split."""
    row = VARIANTS["t2v-a14b"]
    vae = encoder_bytes(["video"], row, NOWHERE, 8)
    assert vae / 4e6 == pytest.approx(126.9, abs=0.1)
    assert encoder_bytes(["text"], row, NOWHERE, 8) == pytest.approx(2 * 5.68e9 / 8, rel=1e-3)
    assert encoder_bytes(["video", "known", "text"], row, NOWHERE, 8) == vae + encoder_bytes(["text"], row, NOWHERE, 8)
    small, large = (encoding_bytes(["video"], row, NOWHERE, Bucket(9, *hw), 1) for hw in ((240, 416), (480, 832)))
    assert large == pytest.approx(4 * small, rel=0.1) and large > GIB
    assert encoding_bytes(["text"], row, NOWHERE, BUCKET, 1) == 0
