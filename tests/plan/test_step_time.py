"""Predicted times: against the blocks that the table is fitted to, and each part by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from wan_accel.flops import PEAK_TFLOPS, StepFlops, Work, recomputed_flops, split_step_flops, step_flops
from wan_accel.models.variants import VARIANTS
from wan_accel.plan.collectives import Traffic
from wan_accel.plan.gpus import chosen_gpus, read_gpus
from wan_accel.plan.layout import Layout
from wan_accel.plan.step_time import RankStep, predict

H100 = read_gpus()["H100"]
NOTHING = StepFlops(products=0.0, attention=0.0)


def rank_step(**changes: object) -> RankStep:
    plain = RankStep(
        flops=NOTHING, recomputed=NOTHING, traffic=(), trained=0, parameters=0, num_micro_steps=1, is_compiled=True,
        fp8=False,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


# Milliseconds of one block on an H100: DiffSynth's and what each way gains on it (docs/TRAINING.md).
BLOCKS = {
    ("t2v-a14b", "full"): (359, {"full": 1.14, "attention": 1.31, 0.5: 1.25, "none": 1.47}),
    ("t2v-a14b", "lora"): (339, {"full": 1.17, "attention": 1.34, 0.5: 1.31, "none": 1.54}),
    ("ti2v-5b", "full"): (157, {"full": 1.20, "attention": 1.35, 0.5: 1.31, "none": 1.54}),
    ("ti2v-5b", "lora"): (152, {"full": 1.24, "attention": 1.42, 0.5: 1.33, "none": 1.61}),
}
TOKENS = {"t2v-a14b": 32760, "ti2v-5b": 27280}


@pytest.mark.parametrize(("variant", "method"), BLOCKS)
def test_blocks_take_as_long_as_was_measured(variant: str, method: str) -> None:
    """To 12%, over all policies."""
    one = replace(VARIANTS[variant].dit, num_layers=1, in_dim=0, out_dim=0)
    work, tokens = Work(lora_rank=32 if method == "lora" else None), TOKENS[variant]
    theirs, gains = BLOCKS[variant, method]
    for policy, gain in gains.items():
        step = rank_step(
            flops=split_step_flops(one, tokens, work), recomputed=recomputed_flops(one, tokens, work, policy)
        )
        seconds = predict(step, Layout(engine="single", world_size=1), H100).compute
        assert 1000 * seconds == pytest.approx(theirs / gain, rel=0.12), policy


def test_flops_by_kind() -> None:
    size, work = VARIANTS["t2v-a14b"].dit, Work()
    split = split_step_flops(size, 32760, work)
    assert split.total == step_flops(size, 32760, work) and split.attention == pytest.approx(3 * 40 * 22.3e12, rel=0.01)
    full = recomputed_flops(size, 32760, work, "full")
    assert full.total == pytest.approx(split.total / 3, rel=0.01)  # a forward pass, but for what lies around the blocks
    assert recomputed_flops(size, 32760, work, "attention") == StepFlops(products=full.products, attention=0.0)
    assert recomputed_flops(size, 32760, work, 0.25) == recomputed_flops(size, 32760, work, "attention")
    assert recomputed_flops(size, 32760, work, "none").total == 0


def test_parts_by_hand() -> None:
    layout = Layout(engine="fsdp2", world_size=64, ulysses=4)
    traffic = (
        Traffic(kind="all-gather", axis="dp_shard", num_ranks=64, calls=1, bytes=640_000_000_000),
        Traffic(kind="all-to-all", axis="ulysses", num_ranks=4, calls=1, bytes=36_000_000_000),
    )
    flops = StepFlops(products=H100.products * H100.tflops * 1e12, attention=H100.attention * H100.tflops * 1e12)
    found = predict(rank_step(flops=flops, traffic=traffic, trained=10**9), layout, H100)
    assert found.compute == pytest.approx(2.0)
    assert found.sharding == pytest.approx(630 / (0.8 * 50))  # between nodes
    assert found.exchanges == pytest.approx(27 / (0.8 * 450))  # inside of one
    assert found.optimizer == pytest.approx(28e9 / 3350e9)
    assert found.seconds == pytest.approx(found.sharding + found.exchanges + found.optimizer)
    assert found.mfu == pytest.approx((H100.products + H100.attention) / found.seconds)
    eager = predict(rank_step(flops=flops, is_compiled=False, fp8=True), layout, H100)
    assert eager.compute == pytest.approx(1.15 * (1 + 1 / 1.45))
    replicas = Traffic(kind="all-reduce", axis="dp_replicate", num_ranks=2, calls=1, bytes=40_000_000_000)
    hsdp = predict(rank_step(traffic=(replicas,)), replace(layout, engine="hsdp", dp_replicate=2), H100)
    assert hsdp.sharding == pytest.approx(40 / (0.8 * 50))  # ranks 0 and 32 are in different nodes


def test_offloading_waits_for_the_host() -> None:
    step = rank_step(trained=10**9, parameters=2 * 10**9, num_micro_steps=2)
    layout = Layout(engine="zero3", world_size=8, offload="optimizer")
    assert predict(step, layout, H100).optimizer == pytest.approx(4 / 25 + 28 / 25)
    parameters = predict(step, replace(layout, offload="parameters"), H100).optimizer
    assert parameters == pytest.approx(4 / 25 + 28 / 25 + 2 * 2 * 2 / 25)
    # Two micro-steps: bf16 gradients down, up and down, and once in fp32; weights up. FSDP2: fp32 both ways.
    half = predict(step, replace(layout, engine="zero2"), H100).optimizer
    assert half == pytest.approx((6 + 6 + 28) / 25)
    sharded = predict(step, replace(layout, engine="fsdp2", offload="parameters"), H100).optimizer
    assert sharded == pytest.approx((2 * (4 + 2 * 2) + 28) / 25)


def test_the_table_can_be_edited(tmp_path: Path) -> None:
    ours = read_gpus()
    assert all(gpu.tflops == PEAK_TFLOPS[name] for name, gpu in ours.items())
    path = tmp_path / "gpus.yaml"
    row = "{memory_gib: 90, hbm_gb_s: 4000, node_gb_s: 450, network_gb_s: 25}"
    defaults = (
        "{gpus_per_node: 4, products: 0.7, attention: 0.5, fp8: 1.2, eager: 1.1, link_share: 0.9, pcie_gb_s: 50, "
        "host_gb_s: 30, tflops: 700}"
    )
    path.write_text(f"defaults: {defaults}\ngpus:\n  Z1: {row}\n  H100: {row}\n")
    table = read_gpus(path)
    assert list(table)[:2] == ["Z1", "H100"] and table["Z1"].tflops == table["H100"].tflops == 700
    assert table["H100"].network_gb_s == 25 and table["A100"] == ours["A100"]
    assert [gpu.name for gpu in chosen_gpus(table, name=None, memory_gib=90)] == ["Z1", "H100", "H20"]
    assert [gpu.name for gpu in chosen_gpus(table, name="A100", memory_gib=None)] == ["A100"]
    with pytest.raises(ValueError, match="--gpu Z2 is not in the table: use Z1, H100"):
        chosen_gpus(table, name="Z2", memory_gib=None)
    path.write_text("gpus: {Z1: {memory_gib: 90, colour: red}}")
    with pytest.raises(ValueError, match="Z1 lacks attention, eager, fp8"):
        read_gpus(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_gpus(tmp_path / "nothing.yaml")
