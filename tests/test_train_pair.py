"""The shipped recipe for a pair, from clips to one export of both experts."""

from pathlib import Path

import pytest
from tiny_clips import clip_row, write_clips

from wan_accel import cache, checkpoint, export, train
from wan_accel.tiny import init_tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "t2v-a14b" / "lora_pair.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    init_tiny("t2v-a14b", folder / "model")
    write_clips(folder / "clips", [clip_row(number) for number in range(4)])
    return folder


def test_a_pair_is_trained_validated_and_exported_together(root: Path) -> None:
    arguments = [
        str(RECIPE), f"model.checkpoint={root}/model", f"data.clips={root}/clips", "parallel.ulysses=1",
        f"data.latents={root}/latents", f"training.output_dir={root}/run", "data.global_batch.samples=2",
        "training.max_steps=4", "training.save_steps=4", "training.logging_steps=1", "data.eval.fraction=0",
        "training.dataloader_num_workers=0", "training.warmup_steps=0", "training.learning_rate=1e-2",
        "validation.every_steps=4", "validation.sigmas=2", "model.torch_dtype=float32", "memory.compile=false",
    ]  # fmt: skip
    assert cache.main(arguments) == 0
    assert train.main(arguments) == 0
    trained = checkpoint.read_trained(root / "run" / "checkpoint-4")
    assert {name.split(".")[0] for name in trained} == {"high", "low"}
    files = sorted(export.export(root / "run", output=root / "export").glob("*.safetensors"))
    assert ["high_noise" in file.name for file in files] == [True, False]
    assert ["low_noise" in file.name for file in files] == [False, True]
