"""Conditions encoded during training on two ranks: those of one process, and umT5 split before and after each use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_clips import clip_row, write_clips
from torch import Tensor

from wan_accel import cache, train
from wan_accel.models.conditioning.live import LiveEncoder
from wan_accel.parallel.fsdp import num_local_elements
from wan_accel.tiny import init_tiny

RECIPE = """
variant: animate-14b
model: {{checkpoint: {root}/model}}
method: {{kind: lora, r: 4}}
data:
  clips: {root}/clips
  latents: {root}/latents
  on_the_fly: [video, text, known]
  augment: {module}:darken
  augment_caption: {module}:shuffle_words
  global_batch: {{samples: 4}}
  caption_dropout: 0.2
cache: {{known_variants: 1}}
memory: {{activation_checkpointing: none}}
training:
  output_dir: {root}/cached
  max_steps: 3
  learning_rate: 1e-2
  lr_scheduler_type: constant
  save_strategy: "no"
  logging_steps: 1
  dataloader_num_workers: 0
"""
Batch = dict[str, Tensor]


def darken(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return frames // int(rng.integers(1, 9))


def shuffle_words(caption: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(caption.split()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("live")
    init_tiny("animate-14b", folder / "model")
    write_clips(folder / "clips", [clip_row(n, caption="a square moves over there " + "very " * n) for n in range(5)])
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder, module=__name__))
    assert cache.main([str(path)]) == 0
    return str(path)


def launched(recipe: str, output_dir: str, *overrides: str) -> dict[str, Any]:
    """Train as `wan_accel.train` does; every encoded micro-batch, and the elements of umT5 held around each encode."""
    batches: list[Batch] = []
    held: set[int] = set()

    def encode(self: LiveEncoder, batch: Batch) -> Batch:
        assert self.text_encoder is not None
        held.add(num_local_elements(self.text_encoder.model))
        fresh = plain(self, batch)
        held.add(num_local_elements(self.text_encoder.model))
        batches.append({name: value.clone() for name, value in fresh.items()})
        return fresh

    plain, LiveEncoder.__call__ = LiveEncoder.__call__, encode  # type: ignore[method-assign]
    assert train.main([recipe, f"training.output_dir={output_dir}", *overrides]) == 0
    return {"batches": batches, "held": held}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def single(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Batch], int, list[float]]:
    """One process: its micro-batches, the elements of umT5, its losses."""
    run = tmp_path_factory.mktemp("single") / "run"
    (rank,) = run_ranks(launched, 1, recipe, str(run), engine="single")
    (whole,) = rank["held"]
    return rank["batches"], whole, losses(run)


@pytest.mark.parametrize("ulysses", [1, 2])
def test_two_ranks_train_on_what_one_would(
    recipe: str, single: tuple[list[Batch], int, list[float]], tmp_path: Path, ulysses: int
) -> None:
    expected, whole, trajectory = single
    ranks = run_ranks(launched, 2, recipe, str(tmp_path), f"parallel.ulysses={ulysses}", engine="fsdp2")
    assert losses(tmp_path) == pytest.approx(trajectory, rel=1e-5)
    shares = [rank["held"] for rank in ranks]
    assert [len(share) for share in shares] == [1, 1]  # the same before and after each encode
    assert sum(map(max, shares)) == whole and max(map(max, shares)) <= 0.51 * whole
    if ulysses == 2:  # a group sees what one process sees, in its order
        for rank in ranks:
            assert_same(rank["batches"], expected)
    else:
        given = [batch for rank in ranks for batch in rank["batches"]]
        counted = [batch for batch in given if batch["weight"] > 0]
        assert len(given) > len(counted)  # fillers for an odd number of samples take part in encodes
        assert_same(by_sigma(counted), by_sigma(expected))


def by_sigma(batches: list[Batch]) -> list[Batch]:
    return sorted(batches, key=lambda batch: float(batch["sigma"]))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Micro-batches of one sample each, bit for bit."""
    assert len(found) == len(expected) == len({float(batch["sigma"]) for batch in expected})
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_every_draw_is_augmented_anew(single: tuple[list[Batch], int, list[float]]) -> None:
    """What the comparison above would miss: latents, known pixels or texts that are the same in every draw."""
    for name in ("latents", "condition", "text"):
        assert len({float(batch[name].float().sum()) for batch in single[0]}) > 3, name
