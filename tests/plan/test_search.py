"""Other layouts: which are looked at, and what they are said to change."""

from dataclasses import replace

import pytest

from wan_accel.draws import Bucket
from wan_accel.models.variants import VARIANTS
from wan_accel.plan.ask import Ask
from wan_accel.plan.layout import Layout
from wan_accel.plan.search import alternatives, difference
from wan_accel.plan.weights import released_shapes
from wan_accel.recipe.load import load_recipe


@pytest.fixture(scope="module")
def ask() -> Ask:
    recipe = load_recipe("t2v-a14b/lora", ["model.checkpoint=/nowhere"])
    return Ask(
        recipe=recipe, layout=Layout(engine="fsdp2", world_size=8, ulysses=4),
        shapes=released_shapes(VARIANTS["t2v-a14b"]), clips={Bucket(81, 480, 832): 1},
    )  # fmt: skip


def test_mesh_x_recomputation_x_offload(ask: Ask) -> None:
    found = list(alternatives(ask, 8))
    meshes = {(layout.engine, layout.dp_replicate, layout.ulysses) for _, layout in found}
    assert {(engine, replicas, degree) for engine, replicas, degree in meshes if "zero" not in engine} == {
        *(("fsdp2", 1, degree) for degree in (1, 2, 4, 8)),
        *(("hsdp", 2, degree) for degree in (1, 2, 4)),
        *(("hsdp", 4, degree) for degree in (1, 2)),
    }
    assert {recipe.memory.activation_checkpointing for recipe, _ in found} == {"full", "attention", "none"}
    assert {layout.offload for _, layout in found if layout.engine == "zero3"} == {"none", "optimizer", "parameters"}
    assert {layout.offload for _, layout in found if layout.engine == "zero2"} == {"none", "optimizer"}
    assert {layout.offload for _, layout in found if layout.is_sharded} == {"none", "parameters"}
    assert all(recipe.memory.compile == (layout.engine != "zero3") for recipe, layout in found)
    assert not any(layout.can_be_simulated for _, layout in found if layout.offload != "none")
    assert all(recipe.parallel.ulysses == layout.ulysses for recipe, layout in found)
    assert (ask.recipe, ask.layout) not in found
    # 16 data ranks would not share 8 samples out.
    assert {layout.ulysses for _, layout in alternatives(ask, 16)} == {2, 4, 8}
    # What `check` refuses is not looked at: a budget under ZeRO-3.
    half = ask.on(ask.layout, replace(ask.recipe, memory=replace(ask.recipe.memory, activation_checkpointing=0.5)))
    of_zero = [recipe.memory for recipe, layout in alternatives(half, 8) if layout.engine == "zero3"]
    assert {memory.activation_checkpointing for memory in of_zero} == {"full", "attention", "none"}


def test_one_gpu_has_no_mesh(ask: Ask) -> None:
    recipe = replace(ask.recipe, parallel=replace(ask.recipe.parallel, ulysses=1))
    alone = ask.on(Layout(engine="single", world_size=1), recipe)
    assert {(layout.engine, layout.ulysses) for _, layout in alternatives(alone, 1)} == {("single", 1)}


def test_what_is_changed(ask: Ask) -> None:
    def changed(policy: str, layout: Layout, *, compile: bool = True) -> tuple[tuple[str, ...], float]:
        memory = replace(ask.recipe.memory, activation_checkpointing=policy, compile=compile)
        recipe = replace(ask.recipe, memory=memory, parallel=replace(ask.recipe.parallel, ulysses=layout.ulysses))
        return difference(ask, recipe, layout)

    assert changed("full", ask.layout) == (("memory.activation_checkpointing=full",), 1)
    assert changed("attention", replace(ask.layout, ulysses=8)) == (("parallel.ulysses=8",), 1)
    assert changed("attention", replace(ask.layout, ulysses=1)) == (("parallel.ulysses=1",), 2)
    hsdp = replace(ask.layout, engine="hsdp", dp_replicate=2)
    assert changed("attention", hsdp) == (("hsdp.yaml (2 replicas)",), 1)
    assert changed("attention", replace(ask.layout, world_size=32)) == (("--num_processes 32",), 4)
    zero = replace(ask.layout, engine="zero3", offload="optimizer")
    assert changed("attention", zero, compile=False) == (
        ("zero3.yaml", "offload to cpu: optimizer", "memory.compile=false"), 5,
    )  # fmt: skip
    on_host = replace(ask.layout, offload="parameters")
    assert changed("attention", on_host) == (("fsdp_offload_params: true",), 2)
