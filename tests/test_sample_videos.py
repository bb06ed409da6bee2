"""Videos drawn during training and by evaluation: the files, the trackers, and what a failure does to a run."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny_clips import clip_row, write_clips
from torch.nn.modules.module import register_module_forward_hook
from transformers import TrainerCallback

from wan_accel import cache, evaluate, train
from wan_accel.checkpoint import complete_checkpoints
from wan_accel.data.clips import decode_mp4
from wan_accel.data.latents import ClipInfo, LatentsDataset
from wan_accel.draws import SampleDraw
from wan_accel.models.blocks import WanBlock
from wan_accel.models.encoders import load_vae
from wan_accel.models.variants import get_variant
from wan_accel.recipe.load import load_recipe
from wan_accel.sample_files import SampleFiles, SampleWriter, to_frames, write_mp4
from wan_accel.sample_sheet import SheetClip, columns_of, sample_sheet
from wan_accel.sample_trackers import log_samples
from wan_accel.sample_videos import SampleCallback
from wan_accel.tiny import init_tiny

RECIPE = """
variant: animate-14b
model: {{checkpoint: {root}/model, torch_dtype: bfloat16}}
method: {{kind: lora, r: 4, lora_alpha: 8}}
data: {{clips: {root}/clips, latents: {root}/latents, global_batch: {{samples: 2}}, eval: {{fraction: 0.5}}}}
cache: {{known_variants: 1}}
memory: {{activation_checkpointing: none}}
validation: {{every_steps: 2, sigmas: 2, sample: {{num_clips: 2, num_steps: 3, guidance: 2.0}}}}
training:
  output_dir: {root}/run
  learning_rate: 1e-2
  lr_scheduler_type: constant
  max_steps: 4
  logging_steps: 1
  save_steps: 2
  dataloader_num_workers: 0
  seed: 0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, four clips, their cached conditions, and a run that has drawn videos."""
    folder = tmp_path_factory.mktemp("job")
    init_tiny("animate-14b", folder / "model")
    write_clips(folder / "clips", [clip_row(number) for number in range(4)])
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    assert cache.main([str(folder / "recipe.yaml")]) == 0
    assert train.main([str(folder / "recipe.yaml")]) == 0
    return folder


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def last_evaluation(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval_loss" in line)
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_draws_videos(root: Path) -> None:
    samples = root / "run" / "samples"
    assert names(samples) == ["ground-truth", "step-0", "step-2", "step-4"]
    videos = names(samples / "ground-truth")
    for step in (0, 2, 4):
        assert names(samples / f"step-{step}") == ["contact_sheet.png", *videos]
    drawn = [decode_mp4((samples / f"step-{step}" / videos[0]).read_bytes()) for step in (0, 4)]
    assert drawn[0].shape == drawn[1].shape == (5, 48, 32, 3)
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 1  # other weights
    assert (root / "run" / "loss_by_sigma.png").stat().st_size > 5000


def test_videos_are_the_decoded_latents(root: Path) -> None:
    """The ground truth: the cached latents without the reference slot, through the VAE."""
    source, vae = LatentsDataset(root / "latents"), load_vae(root / "model", get_variant("animate-14b"))
    name = names(root / "run" / "samples" / "ground-truth")[0]
    row = source.clip_ids.index(name.removesuffix(".mp4"))
    stored = decode_mp4((root / "run" / "samples" / "ground-truth" / name).read_bytes())
    cached = source.sample(row, SampleDraw(index=row, epoch=0, sigma=1.0, noise_seed=0))["latents"][:, 1:]
    frames = to_frames(vae.decode(cached[None])[0])
    assert stored.shape == frames.shape
    assert psnr(stored, frames) > 20  # 4:2:0 chroma of a picture that is all colour


def test_clips_of_one_name_in_two_folders_have_files_of_their_own(root: Path, tmp_path: Path) -> None:
    source = LatentsDataset(root / "latents")
    writer = SampleWriter(get_variant("animate-14b"), root / "model", tmp_path, device=torch.device("cpu"))
    items = []
    for row, (folder, clip_id) in enumerate([("a", "clip"), ("b", "clip"), ("", "a_clip")]):
        info = ClipInfo(clip_id=clip_id, caption="", fps=16.0, folder=folder)
        latents = source.sample(row, SampleDraw(index=row, epoch=0, sigma=1.0, noise_seed=0))["latents"][:, 1:]
        items.append((info, latents, latents))
    files = writer.write("step-1", items, title="t")
    videos = ["a%2Fclip.mp4", "a_clip.mp4", "b%2Fclip.mp4"]
    assert names(tmp_path / "step-1") == [*videos, "contact_sheet.png"]
    assert list(files.videos) == list(files.fps) == ["a/clip", "b/clip", "a_clip"]
    truths = [(tmp_path / "ground-truth" / name).read_bytes() for name in videos]
    assert truths == [(tmp_path / "step-1" / name).read_bytes() for name in videos] and len(set(truths)) == 3


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    squared = float(np.square(found.astype(float) - expected).mean())
    return float(10 * np.log10(255**2 / max(squared, 1e-9)))


def test_training_is_the_same_without_videos_and_a_resumed_run_keeps_them(root: Path, tmp_path: Path) -> None:
    recipe = [str(root / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"]
    assert train.main([*recipe, "validation.sample=null"]) == 0
    assert losses(tmp_path / "run") == losses(root / "run")
    assert not (tmp_path / "run" / "samples").exists()
    shutil.copytree(root / "run", tmp_path / "again")
    marker = tmp_path / "again" / "samples" / "step-4" / "marker"
    marker.touch()
    recipe[1] = f"training.output_dir={tmp_path / 'again'}"
    assert train.main([*recipe, "training.max_steps=5", "validation.sample.every_steps=1"]) == 0
    assert marker.exists()  # step 4 was there, and was not drawn again
    assert "step-5" in names(tmp_path / "again" / "samples")


def test_evaluation_of_a_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA over a bf16 base: evaluation merges and runs in fp32, so it agrees to bf16's precision."""
    recipe = str(root / "recipe.yaml")
    monkeypatch.chdir(root / "run" / "checkpoint-4")
    capsys.readouterr()
    assert evaluate.main([recipe, "--checkpoint", ".", "--sample", "--output", str(tmp_path / "x")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "x").read_text())
    trained = last_evaluation(root / "run")
    assert printed.keys() - {"num_draws"} == trained.keys()
    assert printed["eval_loss"] == pytest.approx(trained["eval_loss"], rel=2e-2)
    samples = root / "run" / "samples"
    assert names(samples / "checkpoint-4") == names(samples / "step-4")
    name = names(samples / "step-4")[1]
    live, reloaded = (decode_mp4((samples / part / name).read_bytes()) for part in ("step-4", "checkpoint-4"))
    base = decode_mp4((samples / "step-0" / name).read_bytes())
    assert psnr(reloaded, live) > psnr(reloaded, base) + 3


@pytest.mark.parametrize("method", ["{kind: lora, r: 4, lora_alpha: 8}", "{kind: full}"])
def test_evaluation_equals_the_live_weights(
    method: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In fp32: losses to 1e-5, and the videos look the same."""
    changes = [
        str(root / "recipe.yaml"), "model.torch_dtype=float32", f"method={method}", "training.max_steps=2",
        f"training.output_dir={tmp_path / 'run'}", "training.learning_rate=1e-3",
        "validation.sample.ground_truth=clips",
    ]  # fmt: skip
    assert train.main(changes) == 0
    trained = last_evaluation(tmp_path / "run")
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    assert evaluate.main([*changes, "--checkpoint", checkpoint, "--samples", str(tmp_path / "videos" / "mine")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: printed[name] for name in trained} == pytest.approx(trained, rel=1e-5)
    name = names(tmp_path / "videos" / "mine")[1]
    pair = [tmp_path / "videos" / "mine" / name, tmp_path / "run" / "samples" / "step-2" / name]
    assert psnr(*(decode_mp4(path.read_bytes()) for path in pair)) > 35
    truth = decode_mp4((tmp_path / "run" / "samples" / "ground-truth" / name).read_bytes())
    clip = decode_mp4(clip_row(int(name[6]))["video"]["bytes"])
    assert psnr(truth, clip) > 25  # the clip's own frames


def launched_train(recipe: str, changes: list[str]) -> int:
    return train.main([recipe, *changes])


def launched_evaluate(recipe: str, changes: list[str], checkpoint: str, samples: str) -> dict[str, float]:
    loaded = load_recipe(recipe, [*changes, *evaluate.OVERRIDES])
    return evaluate.evaluate(loaded, checkpoint=Path(checkpoint), samples=Path(samples))


def test_two_ranks_draw_and_evaluate(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A full ZeRO-3 run draws; its checkpoint is evaluated by FSDP2 and by one process, with the same numbers."""
    recipe, run = str(root / "recipe.yaml"), tmp_path / "run"
    changes = [
        "model.torch_dtype=float32", "method={kind: full}", "training.max_steps=2", f"training.output_dir={run}",
        "training.learning_rate=1e-3",
    ]  # fmt: skip
    assert run_ranks(launched_train, 2, recipe, changes, engine="zero3") == [0, 0]
    assert names(run / "samples" / "step-2") == names(root / "run" / "samples" / "step-2")
    found = run_ranks(
        launched_evaluate, 2, recipe, changes, str(run), str(run / "samples" / "fsdp2"), engine="fsdp2"
    )
    assert found[1] == {}  # the main rank has them
    trained = last_evaluation(run)
    assert {name: found[0][name] for name in trained} == pytest.approx(trained, rel=1e-5)
    assert evaluate.main([recipe, *changes, "--checkpoint", str(run), "--sample"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone == pytest.approx(found[0], rel=1e-5)
    name = names(run / "samples" / "step-2")[1]
    live, *others = (
        decode_mp4((run / "samples" / part / name).read_bytes()) for part in ("step-2", "fsdp2", "checkpoint-2")
    )
    assert all(psnr(other, live) > 35 for other in others)


def evaluate_in_bf16(recipe: str, checkpoint: str) -> tuple[set[torch.dtype], dict[str, float]]:
    """The dtypes that blocks hand on, and the losses."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    dtypes: set[torch.dtype] = set()

    def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, WanBlock):
            dtypes.add(output.dtype)

    register_module_forward_hook(record)
    metrics = evaluate.evaluate(load_recipe(recipe, list(evaluate.OVERRIDES)), checkpoint=Path(checkpoint))
    return dtypes, metrics


def test_evaluation_computes_in_the_same_precision_on_every_engine(root: Path) -> None:
    found = {
        engine: run_ranks(evaluate_in_bf16, num, str(root / "recipe.yaml"), str(root / "run"), engine=engine)[0]
        for engine, num in {"single": 1, "fsdp2": 2}.items()  # DDP runs the model as one process does
    }
    for dtypes, metrics in found.values():
        assert dtypes == {torch.bfloat16}
        assert metrics == pytest.approx(found["single"][1], rel=1e-2)  # bf16 has 8 bits
        assert metrics["eval_loss"] == pytest.approx(last_evaluation(root / "run")["eval_loss"], rel=2e-2)


def test_evaluation_refuses_weights_and_folders_of_something_else(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = str(root / "recipe.yaml")
    assert evaluate.main([recipe, "--checkpoint", str(tmp_path)]) == 2
    assert "holds no complete checkpoint: give a run's output_dir" in capsys.readouterr().err
    (tmp_path / "mine").write_text("mine")
    assert evaluate.main([recipe, "--checkpoint", str(root / "run"), "--samples", str(tmp_path)]) == 2
    assert f"--samples {tmp_path} holds something else than videos of an evaluation" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(root / "run" / "checkpoint-4", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "variant": "t2v-1.3b"}))
    assert evaluate.main([recipe, "--checkpoint", str(copy)]) == 2
    assert "trains the default expert of t2v-1.3b, the recipe asks for the default expert of animate-14b" in (
        capsys.readouterr().err
    )
    manifest |= {"method": "full", "trained": {"blocks.0.nothing": [2, 2]}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate.main([recipe, "--checkpoint", str(copy)]) == 2
    assert "1 of 1 tensors" in (message := capsys.readouterr().err) and "set model.checkpoint to what" in message


def test_too_many_clips_are_refused_before_anything_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(root / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}", "validation.sample.num_clips=3"]
    assert train.main(arguments) == 2
    assert "num_clips=3 but validation has 2 clips: use at most that many, or raise" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_failed_picture_does_not_end_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved: dict[str, list[str]] = {}

    def full_disk(self: SampleWriter, name: str, drawn: Any, **kwargs: Any) -> SampleFiles:
        saved[name] = [path.name for path in complete_checkpoints(tmp_path / "run")]
        raise OSError("No space left on device")

    monkeypatch.setattr(SampleWriter, "write", full_disk)
    changes = [f"training.output_dir={tmp_path / 'run'}", "training.save_strategy=no"]
    assert train.main([str(root / "recipe.yaml"), *changes]) == 0
    assert saved == {"step-0": [], "step-2": [], "step-4": ["checkpoint-4"]}  # the end is saved before it is drawn
    assert losses(tmp_path / "run") == losses(root / "run")
    failed = [record for record in caplog.records if "could not be written" in record.message]
    assert [record.levelno for record in failed] == [logging.ERROR] * 3  # it is tried again each time


def test_out_of_memory_is_logged_once_and_training_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from wan_accel import sample_drawing

    def exhausted(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(sample_drawing, "sample_latents", exhausted)
    assert train.main([str(root / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"]) == 0
    assert losses(tmp_path / "run") == losses(root / "run")
    messages = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2 and "Tried to allocate 20.00 GiB" in messages[0]
    assert messages[1].startswith("no more videos in this run")


class TensorBoardCallback(TrainerCallback):
    """Takes what the Trainer's own callback of this name would write."""

    def __init__(self) -> None:
        self.images: list[tuple[Any, ...]] = []
        self.tb_writer: Any = SimpleNamespace(add_image=lambda *args, **kwargs: self.images.append((*args, kwargs)))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.tb_writer = None


def test_tensorboard_gets_the_sheets_until_the_end(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(root / "recipe.yaml"), [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"])
    trainer = train.build_trainer(recipe)
    tracker = TensorBoardCallback()
    trainer.add_callback(tracker)
    trainer.train()
    assert [(tag, step) for tag, _, step, _ in tracker.images] == [("samples/contact_sheet", step) for step in (0, 2)]
    for (_, picture, step, options) in tracker.images:
        sheet = Image.open(tmp_path / "run" / "samples" / f"step-{step}" / "contact_sheet.png")
        assert np.array_equal(picture, np.asarray(sheet)) and options == {"dataformats": "HWC"}


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_other_trackers_get_media_made_from_the_files(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls, on a stand-in: neither is installed for the tests."""
    logged: list[dict[str, Any]] = []
    module = SimpleNamespace(
        log=logged.append, Image=lambda path: ("image", path), Video=lambda path, format: ("video", path, format)
    )
    monkeypatch.setitem(sys.modules, library, module)
    callback = type(f"{library.capitalize()}Callback", (TrainerCallback,), {})()
    files = SampleFiles(sheet=tmp_path / "sheet.png", videos={"a": tmp_path / "a.mp4"}, fps={"a": 16.0})
    assert log_samples([TrainerCallback(), callback], files, step=7) == [type(callback).__name__]
    assert logged == [
        {
            "samples/contact_sheet": ("image", str(tmp_path / "sheet.png")),
            "samples/a": ("video", str(tmp_path / "a.mp4"), "mp4"),
            "train/global_step": 7,
        }
    ]


def test_mp4_is_what_players_take(tmp_path: Path) -> None:
    import av

    frames = np.linspace(0, 255, 9 * 32 * 48 * 3).reshape(9, 32, 48, 3).astype(np.uint8)
    write_mp4(tmp_path / "x.mp4", frames, 23.976)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.pix_fmt, stream.frames) == ("yuv420p", 9)
        assert float(stream.average_rate) == pytest.approx(23.976, rel=1e-4)
    data = (tmp_path / "x.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is whole
    assert psnr(decode_mp4(data), frames) > 35


def test_sheet_puts_ground_truth_above_samples() -> None:
    colors = {"truth": (200, 40, 40), "sample": (40, 40, 200)}
    truth, sample = (np.full((6, 32, 48, 3), color, np.uint8) for color in colors.values())
    clips = [
        SheetClip(name=f"clip{n}", caption="a " * 400, moments=(0, 0.2, 0.4, 0.6, 0.8, 1.0), truth=truth, sample=sample)
        for n in range(2)
    ]
    sheet = np.asarray(sample_sheet(clips, title="t", label="step 3"))
    rows = [tuple(row) for row in sheet[:, 240].tolist()]
    blocks = [row for row, above in zip(rows[1:], rows) if row != above and row in colors.values()]
    assert blocks == [colors["truth"], colors["sample"]] * 2
    columns = [tuple(pixel) for pixel in sheet[rows.index(colors["truth"])].tolist()]
    assert sum(a != colors["truth"] == b for a, b in zip(columns, columns[1:])) == 6
    assert columns_of(81).tolist() == [0, 16, 32, 48, 64, 80] and columns_of(5).tolist() == [0, 1, 2, 3, 4]


def test_callback_stands_before_the_trackers(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(root / "recipe.yaml"), [f"training.output_dir={tmp_path / 'run'}"])
    callbacks = train.build_trainer(recipe).callback_handler.callbacks
    assert isinstance(callbacks[0], SampleCallback) and callbacks[0].every_steps == 2
