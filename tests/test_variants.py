"""Every variant from tiny weights to two training steps, by its shipped recipes."""

import json
import math
from pathlib import Path

import pytest
from tiny_clips import clip_row, write_clips

from wan_accel import cache, checkpoint, train
from wan_accel.data.latents import LatentsDataset
from wan_accel.models.variants import VARIANTS
from wan_accel.recipe.load import shipped_recipes
from wan_accel.tiny import init_tiny

METHODS = ("lora", "full")
# Clips are few and small, and everything runs in this process; the rest is as shipped.
OVERRIDES = (
    "data.global_batch.samples=2", "data.micro_batch.samples=2", "data.eval.fraction=0", "parallel.ulysses=1",
    "cache.known_variants=1", "training.max_steps=2", "training.logging_steps=1",
    "training.warmup_steps=0", "training.save_steps=2", "training.dataloader_num_workers=0",
)  # fmt: skip
# Compiling for the CPU takes half a minute a run; one of the recipes is compiled as it is shipped.
COMPILED = ("ti2v-5b", "lora")
VIDEOS = "validation={every_steps: 2, sigmas: 1, sample: {num_clips: 1, num_steps: 2, guidance: 2}}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [clip_row(number, hw=(64, 32)) for number in range(2)]
    return write_clips(tmp_path_factory.mktemp("clips") / "clips", rows)


def test_every_variant_has_its_recipes() -> None:
    assert {f"{variant}/{method}" for variant in VARIANTS for method in METHODS} <= set(shipped_recipes())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_cached_and_trained(variant: str, clips: Path, tmp_path: Path) -> None:
    init_tiny(variant, tmp_path / "model")
    paths = [f"model.checkpoint={tmp_path / 'model'}", f"data.clips={clips}", f"data.latents={tmp_path / 'latents'}"]
    assert cache.main([f"{variant}/lora", *paths, *OVERRIDES]) == 0
    assert len(LatentsDataset(tmp_path / "latents")) == 2
    for method in METHODS:
        run = tmp_path / method
        changes = [VIDEOS, f"training.output_dir={run}", f"memory.compile={str((variant, method) == COMPILED).lower()}"]
        assert train.main([f"{variant}/{method}", *paths, *OVERRIDES, *changes]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
        saved = checkpoint.read_manifest(checkpoint.last_checkpoint(run))
        assert {path.name for path in (run / "samples").iterdir()} == {"ground-truth", "step-0", "step-2"}
        assert (saved.step, saved.variant, saved.method) == (2, variant, method)
