"""A simulated micro step: bytes are those of the formulas, and collectives those of real ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_run import LORA, small_trainer
from synthetic import SyntheticSource, plan_for

from wan_accel.assemble import Techniques
from wan_accel.draws import Bucket
from wan_accel.lora import LoraSettings
from wan_accel.models.attention import rope_table
from wan_accel.models.dit import AnimateSize, dit_size_from_shapes
from wan_accel.models.reader import CheckpointReader, TensorShapes
from wan_accel.models.variants import VARIANTS, DitSize
from wan_accel.plan.ask import units_of_skeleton
from wan_accel.plan.collectives import CountCollectives, Traffic
from wan_accel.plan.formula import Fixed, Trained, fixed_bytes
from wan_accel.plan.layout import Layout
from wan_accel.plan.simulate import Task, axes_of, simulate
from wan_accel.plan.traffic import micro_step_traffic
from wan_accel.plan.weights import ModelShapes, shapes_of

BUCKET = Bucket(5, 32, 48)
TEXT_LENGTH = 16
OPTIMIZERS = {
    "adamw_torch": partial(torch.optim.AdamW, foreach=True),
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, foreach=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2v", "t2v-1.3b")


@pytest.fixture(scope="module")
def shapes(folder: Path) -> dict[str, TensorShapes]:
    return {"t2v-1.3b": CheckpointReader(folder), "animate-14b": animate_shapes()}


def animate_shapes() -> ModelShapes:
    size = DitSize(
        dim=96, ffn_dim=128, num_layers=6, num_heads=8, in_dim=36, out_dim=16, freq_dim=32, text_dim=24, clip_dim=40
    )
    animate = AnimateSize(
        dim=96, num_heads=8, num_face_blocks=2, motion_channels=(2,) * 8, motion_dim=20, face_width=8
    )
    return shapes_of(size, animate, folder=Path("tiny"))


def task_for(
    shapes: TensorShapes, variant: str, layout: Layout, *, method: str = "full", optim: str = "adamw_torch_fused",
    policy: str | float = "none", compile: bool = False, **more: Any,
) -> Task:  # fmt: skip
    techniques = Techniques(
        lora=LoraSettings(**LORA) if method == "lora" else None,  # type: ignore[arg-type]
        torch_dtype=torch.bfloat16 if method == "lora" else torch.float32,
        activation_checkpointing=policy,  # type: ignore[arg-type]
        compile=compile,
    )
    return Task(
        variant=VARIANTS[variant], shapes=shapes, techniques=techniques, layout=layout,
        bucket=BUCKET, num_samples=1, optim=optim, optimizer=OPTIMIZERS[optim], text_length=TEXT_LENGTH, **more,
    )  # fmt: skip


def formula_of(task: Task, optim: str, **how: Any) -> Fixed:
    units = units_of_skeleton(task.variant, task.shapes, task.techniques)
    return fixed_bytes(units, task.layout, Trained(optim=optim, **how))


CASES = {
    "fsdp2": ("t2v-1.3b", "full", Layout(engine="fsdp2", world_size=4), "none"),
    "fsdp2, ulysses": ("t2v-1.3b", "full", Layout(engine="fsdp2", world_size=8, ulysses=4), "attention"),
    "all ranks one group": ("t2v-1.3b", "lora", Layout(engine="fsdp2", world_size=2, ulysses=2), "full"),
    "hsdp": ("t2v-1.3b", "full", Layout(engine="hsdp", world_size=8, dp_replicate=2, ulysses=2), "full"),
    "not mixed": ("t2v-1.3b", "full", Layout(engine="fsdp2", world_size=4, is_mixed=False), "none"),
    "kept gathered": ("t2v-1.3b", "full", Layout(engine="fsdp2", world_size=4, reshard_after_forward=False), "none"),
    "face blocks": ("animate-14b", "full", Layout(engine="fsdp2", world_size=4, ulysses=2), "attention"),
    "face blocks, lora": ("animate-14b", "lora", Layout(engine="fsdp2", world_size=4), "attention"),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_collectives_are_those_of_the_formulas(name: str, shapes: dict[str, TensorShapes]) -> None:
    variant, method, layout, policy = CASES[name]
    task = task_for(shapes[variant], variant, layout, method=method, policy=policy, has_ema=True)
    found, expected = simulate(task), formula_of(task, "adamw_torch_fused", ema="accelerator")
    for part in ("parameters", "gradients", "optimizer", "ema"):
        # Step counts of the optimizer, 4 bytes a parameter, are all that the formula leaves out.
        slack = 4 * 500 if part == "optimizer" else 0
        assert 0 <= found.fixed[part] - getattr(expected, part) <= slack, part
    assert list(found.collectives) == by_formula(task)


def by_formula(task: Task) -> list[Traffic]:
    """As it is counted where one group of all ranks serves two axes."""
    size = dit_size_from_shapes(task.shapes.shapes, num_heads=task.shapes.num_heads)
    units = units_of_skeleton(task.variant, task.shapes, task.techniques)
    traffic = micro_step_traffic(
        units, task.layout, size, num_samples=1, num_tokens=task.variant.num_tokens(*task.bucket),
        policy=task.techniques.activation_checkpointing,
    )  # fmt: skip
    merged: dict[tuple[str, str], Traffic] = {}
    for one in traffic:
        axis = "dp_shard" if task.layout.ulysses == task.layout.world_size else one.axis
        other = merged.get((axis, one.kind))
        if other is not None:
            one = replace(one, calls=other.calls + one.calls, bytes=other.bytes + one.bytes)
        merged[axis, one.kind] = replace(one, axis=axis)
    return [merged[key] for key in sorted(merged)]


def test_compiled_blocks_have_the_same_collectives(shapes: dict[str, TensorShapes]) -> None:
    layout = Layout(engine="fsdp2", world_size=4, ulysses=2)
    task = task_for(shapes["t2v-1.3b"], "t2v-1.3b", layout, policy=0.5, compile=True)
    assert list(simulate(task).collectives) == by_formula(task)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_optimizers_step(optim: str, shapes: dict[str, TensorShapes]) -> None:
    layout = Layout(engine="fsdp2", world_size=2)
    task = task_for(shapes["t2v-1.3b"], "t2v-1.3b", layout, optim=optim)
    found, expected = simulate(task), formula_of(task, optim)
    assert found.fixed["optimizer"] == pytest.approx(expected.optimizer, rel=0.02)
    temporaries = expected.gradients if optim == "adamw_torch" else 0
    assert found.optimizer_temporaries == pytest.approx(temporaries, rel=0.02, abs=1000)


def test_a_second_micro_batch_finds_the_gradients_of_the_first(shapes: dict[str, TensorShapes]) -> None:
    layout = Layout(engine="fsdp2", world_size=2)
    first = task_for(shapes["t2v-1.3b"], "t2v-1.3b", layout, policy="attention")
    one, more = simulate(first), simulate(replace(first, accumulates=True))
    assert one.fixed == more.fixed
    assert more.peak["gradients"] >= one.fixed["gradients"] > one.peak["gradients"]


def test_nothing_fake_is_left_behind(shapes: dict[str, TensorShapes]) -> None:
    simulate(task_for(shapes["t2v-1.3b"], "t2v-1.3b", Layout(engine="fsdp2", world_size=2)))
    assert not torch.distributed.is_initialized()
    assert rope_table.cache_info().currsize == 0
    assert torch.nn.functional.rms_norm(torch.ones(2, 4), (4,)).tolist() == [[1.0] * 4] * 2


def counted_on_ranks(base: str, output_dir: str, engine: str, method: str, ulysses: int) -> list[Traffic]:
    """Collectives of the first micro step of a real run."""
    trainer = small_trainer(
        base, output_dir, engine, method=method, ulysses=ulysses, max_steps=1, save_strategy="no",
        torch_dtype=torch.bfloat16 if method == "lora" else torch.float32,
    )  # fmt: skip
    found: list[list[Traffic]] = []
    run = trainer._micro_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter = CountCollectives(axes_of(trainer.module, trainer.dims.shard_mesh("cpu")))
        with counter:
            loss = run(*args, **kwargs)
        found.append(counter.traffic)
        return loss

    trainer._micro_step = counted
    trainer.train()
    return found[0]


@pytest.mark.parametrize(
    ("engine", "method", "ulysses"), [("fsdp2", "full", 1), ("fsdp2-bf16", "lora", 2)], ids=["full", "lora, ulysses"]
)
def test_collectives_are_those_of_real_ranks(
    engine: str, method: str, ulysses: int, folder: Path, tmp_path: Path
) -> None:
    ranks = run_ranks(counted_on_ranks, 2, str(folder), str(tmp_path), engine, method, ulysses, engine=engine)
    layout = Layout(engine="fsdp2", world_size=2, ulysses=ulysses, is_mixed=engine.endswith("bf16"))
    first = plan_for(SyntheticSource("t2v-1.3b")).step(0, layout.num_data_ranks).micro_steps[0]
    task = replace(task_for(CheckpointReader(folder), "t2v-1.3b", layout, method=method), bucket=first.bucket)
    simulated = list(simulate(task).collectives)
    assert simulated and simulated == ranks[0] == ranks[1]
