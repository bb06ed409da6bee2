"""umT5 split over two ranks: equal outputs, half the parameters each, also after use."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_clips import clip_row, write_clips

from wan_accel import cache
from wan_accel.data import store
from wan_accel.data.cells import cell_to_tensor
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.schema import LATENTS_SCHEMA
from wan_accel.models.encoders import load_text_encoder
from wan_accel.models.loading import CheckpointError
from wan_accel.models.variants import TEXT_ENCODER_FILE, TOKENIZER_FOLDER
from wan_accel.parallel.fsdp import num_local_elements
from wan_accel.parallel.sharded_text import load_sharded_text_encoder
from wan_accel.tiny import init_tiny

TEXTS = [["a square moves", "", "something else altogether"], ["one text only"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "t2v"
    init_tiny("t2v-1.3b", folder)
    return folder


def encode(folder: str) -> tuple[list[list[torch.Tensor]], int, int]:
    """Two rounds, of another number of texts on each rank; elements held before and after."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    encoder = load_sharded_text_encoder(Path(folder), torch_dtype=torch.float32)
    before = num_local_elements(encoder.model)
    states = [encoder.encode(TEXTS[dist.get_rank()]) for _ in range(2)]
    return states, before, num_local_elements(encoder.model)


def test_no_rank_holds_all_parameters(checkpoint: Path) -> None:
    whole = load_text_encoder(checkpoint, torch_dtype=torch.float32)
    total = sum(parameter.numel() for parameter in whole.model.parameters())
    held = 0
    for texts, (rounds, before, after) in zip(TEXTS, run_ranks(encode, 2, str(checkpoint))):
        for states in rounds:
            for ours, theirs in zip(states, whole.encode(texts), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert before == after <= 0.51 * total
        held += before
    assert held == total


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_embedding.weight", f"{TEXT_ENCODER_FILE} has no tensor token_embedding.weight: it is not the file of"),
        ("blocks.0.norm1.weight", r"does not fit the model \(1 tensors\).*\n  missing blocks\.0\.norm1\.weight"),
    ],
)
def test_missing_tensors_are_named(checkpoint: Path, tmp_path: Path, name: str, message: str) -> None:
    """Before anything collective, whether they show a size or not."""
    shutil.copytree(checkpoint / TOKENIZER_FOLDER, tmp_path / TOKENIZER_FOLDER)
    state = torch.load(checkpoint / TEXT_ENCODER_FILE, weights_only=True)
    del state[name]
    torch.save(state, tmp_path / TEXT_ENCODER_FILE)
    with pytest.raises(CheckpointError, match=message):
        load_sharded_text_encoder(tmp_path)


def cache_rank(recipe: str) -> int:
    return cache.main([recipe, "cache.shard_text_encoder=true"])


def test_cache_encodes_with_a_sharded_encoder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """17 texts on two ranks in batches of 8 are 9 and 8: the second has a forward more than it needs."""
    write_clips(tmp_path / "clips", [clip_row(n, caption=f"caption {n} " + "very " * n) for n in range(15)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"variant: t2v-1.3b\nmodel: {{checkpoint: {checkpoint}}}\nmethod: {{kind: lora}}\n"
        f"data: {{clips: {tmp_path / 'clips'}, latents: {tmp_path / 'latents'}, where: num_frames = 5}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, max_steps: 1}}\n"
    )
    assert cache.main([str(recipe), "cache.shard_text_encoder=true"]) == 2
    assert "cache.shard_text_encoder=true on 1 process: launch several" in capsys.readouterr().err
    assert run_ranks(cache_rank, 2, str(recipe)) == [0, 0]
    assert len(LatentsDataset(tmp_path / "latents")) == 15
    rows = list(store.load(tmp_path / "latents" / "text", LATENTS_SCHEMA))
    assert len(rows) == 17
    encoder = load_text_encoder(checkpoint)
    for row in rows[:4]:
        expected = encoder.encode([row["caption"]])[0]
        torch.testing.assert_close(cell_to_tensor(row["embeddings"]), expected, rtol=0.02, atol=0.02)  # bf16
