"""A run that was killed and resumed equals the uninterrupted one; what is on disk; what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from synthetic import GLOBAL_BATCH, SyntheticSource, plan_for

from wan_accel import checkpoint

NUM_STEPS = 6


def train(
    base: str, output_dir: str, engine: str, method: str, kill_after: int | None = None, resume: str | None = None,
    ulysses: int = 1, global_batch: int = GLOBAL_BATCH,
) -> dict[str, Any]:  # fmt: skip
    """Train from an assembled model with a checkpoint every 2 steps; `kill_after` ends every rank like SIGKILL."""
    from transformers import TrainerCallback

    from wan_accel.arguments import WanTrainingArguments
    from wan_accel.assemble import Techniques, assemble
    from wan_accel.lora import LoraSettings
    from wan_accel.models.loading import CheckpointReader
    from wan_accel.models.variants import VARIANTS
    from wan_accel.parallel.cpu import enable_fsdp_on_cpu
    from wan_accel.parallel.engine import launched_engine
    from wan_accel.parallel.mesh import ParallelDims
    from wan_accel.parallel.replicas import launched_replicas
    from wan_accel.trainer import WanTrainer

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == kill_after:
                trainer.writer.wait()  # which save is complete must not depend on the time that writing takes
                os._exit(9)

    enable_fsdp_on_cpu()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = WanTrainingArguments(
        output_dir=output_dir, max_steps=NUM_STEPS, learning_rate=1e-3, logging_steps=1, save_steps=2,
        save_strategy="steps",
        use_cpu=not engine.startswith("zero"), ddp_backend="gloo" if world_size > 1 else None,
        lr_scheduler_type="cosine", warmup_steps=2, global_batch=global_batch, ulysses=ulysses, disable_tqdm=True,
        save_total_limit=2,
    )  # fmt: skip
    variant = VARIANTS["t2v-1.3b"]
    lora = LoraSettings(r=4, lora_alpha=8.0) if method == "lora" else None
    device, engine_found = args.device, launched_engine()
    assert engine_found == engine.partition("-")[0]
    model = assemble(
        variant, CheckpointReader(Path(base)), Techniques(lora=lora, seed=args.seed), engine=engine_found,
        dims=ParallelDims(world_size=world_size, ulysses=ulysses, dp_replicate=launched_replicas()), device=device,
    )  # fmt: skip
    model.text_length = 16
    source = SyntheticSource("t2v-1.3b")
    trainer = WanTrainer(
        model, args, source, plan_for(source, global_batch), variant=variant, lora=lora, base=base, callbacks=[Kill()]
    )
    trainer.train(resume_from_checkpoint=resume)
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


LAYOUTS = {
    "single": ("single", 1),
    "ddp": ("ddp", 2),
    "fsdp2": ("fsdp2", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
}


_SINGLE: dict[str, dict[int, float]] = {}


def single(base: str, method: str, folder: Path) -> dict[int, float]:
    """Losses of one process, once for all layouts (every test writes the same base checkpoint)."""
    if method not in _SINGLE:
        _SINGLE[method] = run_ranks(train, 1, base, str(folder), "single", method, engine="single")[0]
    return _SINGLE[method]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_resumed_equals_uninterrupted(layout: str, method: str, tmp_path: Path) -> None:
    engine, world_size = LAYOUTS[layout]
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run_ranks(train, world_size, base, str(whole), engine, method, engine=engine)[0]
    # Assembled and filled by slices, every engine starts from the same weights: the losses are those of one process.
    alone = single(base, method, tmp_path / "single")
    assert expected == pytest.approx(alone, rel=1e-5)
    with pytest.raises(EOFError):
        run_ranks(train, world_size, base, str(killed), engine, method, 5, engine=engine)
    newest = checkpoint.last_checkpoint(killed)
    assert newest == killed / "checkpoint-4"
    resumed = run_ranks(train, world_size, base, str(killed), engine, method, None, str(newest), engine=engine)[0]
    assert {step: expected[step] for step in (5, 6)} == {step: resumed[step] for step in (5, 6)}
    assert_same_weights(whole / "checkpoint-6", killed / "checkpoint-6", exact=True)
    assert [path.name for path in checkpoint.complete_checkpoints(whole)] == ["checkpoint-4", "checkpoint-6"]
    if method == "lora":
        assert all(".lora_" in name for name in checkpoint.read_trained(whole / "checkpoint-6"))
        size = sum(file.stat().st_size for file in (whole / "checkpoint-6").rglob("*") if file.is_file())
        assert size < 1_000_000  # adapters and their AdamW moments; the base alone has more


def assert_same_weights(left: Path, right: Path, *, exact: bool) -> None:
    first, second = checkpoint.read_trained(left), checkpoint.read_trained(right)
    assert first.keys() == second.keys()
    for name in first:
        if exact:
            assert torch.equal(first[name], second[name]), name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_resume_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """FSDP2 on 2 ranks -> 4 ranks with Ulysses 2 -> one process."""
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = run_ranks(train, 1, base, str(whole), "single", "full", engine="single")[0]
    with pytest.raises(EOFError):
        run_ranks(train, 2, base, str(run), "fsdp2", "full", 3, engine="fsdp2")
    with pytest.raises(EOFError):
        run_ranks(train, 4, base, str(run), "fsdp2", "full", 5, str(run / "checkpoint-2"), 2, engine="fsdp2")
    last = run_ranks(train, 1, base, str(run), "single", "full", None, str(run / "checkpoint-4"), engine="single")[0]
    assert last.keys() == {1, 2, 3, 4, 5, 6}
    for step, loss in expected.items():
        assert last[step] == pytest.approx(loss, rel=1e-5), step
    assert_same_weights(whole / "checkpoint-6", run / "checkpoint-6", exact=False)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resume_on_any_layout_keeps_samples_and_losses(method: str, tmp_path: Path) -> None:
    """A global batch of 12: HSDP 2x2 on 4 ranks with Ulysses 2 -> FSDP2 on 2 -> FSDP2 on 3 ranks."""
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = run_ranks(
        train, 1, base, str(whole), "single", method, None, None, 1, 12, engine="single"
    )[0]
    with pytest.raises(EOFError):
        run_ranks(train, 4, base, str(run), "fsdp2", method, 3, None, 2, 12, engine="hsdp")
    with pytest.raises(EOFError):
        run_ranks(train, 2, base, str(run), "fsdp2", method, 5, str(run / "checkpoint-2"), 1, 12, engine="fsdp2")
    last = run_ranks(train, 3, base, str(run), "fsdp2", method, None, str(run / "checkpoint-4"), 1, 12, engine="fsdp2")
    assert last[0] == pytest.approx(expected, rel=1e-5)  # the lines of all three, by step
    assert_same_weights(whole / "checkpoint-6", run / "checkpoint-6", exact=False)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    base = str(write_checkpoint(tmp_path / "base", "t2v-1.3b"))
    run_ranks(train, 1, base, str(tmp_path / "run"), "single", "full", engine="single")
    last = tmp_path / "run" / "checkpoint-6"
    with pytest.raises(RuntimeError, match="trains another method than this recipe"):
        run_ranks(train, 1, base, str(tmp_path / "lora"), "single", "lora", None, str(last), engine="single")
    with pytest.raises(RuntimeError, match="written by single and cannot be resumed with zero3"):
        run_ranks(train, 1, base, str(tmp_path / "zero"), "zero3", "full", None, str(last), engine="zero3")


def test_torn_and_foreign_checkpoints(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoint-4.tmp"
    (torn / "model").mkdir(parents=True)
    (tmp_path / "checkpoint-2").mkdir()
    assert checkpoint.last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        checkpoint.read_manifest(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(json.dumps({"format": "other@1"}))
    with pytest.raises(ValueError, match="has format 'other@1'"):
        checkpoint.read_manifest(tmp_path / "checkpoint-2")


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    manifest = checkpoint.Manifest(
        engine="single", step=0, variant="t2v-1.3b", expert="default", method="full", base="", lora=None, world_size=1,
        ulysses=1, trained={},
    )  # fmt: skip
    for step in (2, 4, 10):
        checkpoint.commit(checkpoint.start(tmp_path, step), manifest, keep=1)
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["checkpoint-10"]
    # A later version that needs nothing of its readers may add fields.
    path = tmp_path / "checkpoint-10" / checkpoint.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_later": 1}))
    assert checkpoint.read_manifest(path.parent) == manifest
