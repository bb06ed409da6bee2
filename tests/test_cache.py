"""The cache from a recipe to a latents folder: resuming, refusing, and what is left behind."""

import errno
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clips import clip_row, write_clips

from wan_accel import cache, cache_clips
from wan_accel.cache_lock import lone_run
from wan_accel.data import store
from wan_accel.data.cells import cell_to_tensor
from wan_accel.data.clips import Clip
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.schema import CLIPS_SCHEMA, LATENTS_SCHEMA, clips_features
from wan_accel.models.checkpoint_files import condition_keys
from wan_accel.models.conditioning.clips import ClipEncoder
from wan_accel.models.encoders import TextEncoder
from wan_accel.models.loading import MOTION_ENCODER
from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE, get_variant
from wan_accel.tiny import init_tiny

ANIMATE = get_variant("animate-14b")
Run = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "animate"
    init_tiny("animate-14b", folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [clip_row(number) for number in range(3)]


@pytest.fixture
def run(checkpoint: Path, rows: list[dict], tmp_path: Path) -> Run:
    """Cache `tmp_path/clips` (3 clips unless written before) into `tmp_path/latents`, with overrides."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"variant: animate-14b\nmodel: {{checkpoint: {checkpoint}}}\nmethod: {{kind: lora}}\n"
        f"data: {{clips: {tmp_path / 'clips'}, latents: {tmp_path / 'latents'}}}\ncache: {{known_variants: 2}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, learning_rate: 1.0e-4, max_steps: 1}}\n"
    )

    def cached(*arguments: str) -> int:
        if not (tmp_path / "clips").exists():
            write_clips(tmp_path / "clips", rows)
        return cache.main([str(recipe), *arguments])

    return cached


def clip_ids(root: Path) -> list[str]:
    return sorted(store.load(root / "clips", LATENTS_SCHEMA)["clip_id"])


def test_folder_holds_clips_texts_and_nulls(run: Run, tmp_path: Path) -> None:
    assert run() == 0
    root = tmp_path / "latents"
    assert clip_ids(root) == ["square0", "square1", "square2"]
    captions = sorted(store.load(root / "text", LATENTS_SCHEMA)["caption"])
    assert captions[:3] == ["", "a square moves, number 0", "a square moves, number 1"] and len(captions) == 4
    nulls = store.load(root / "null", LATENTS_SCHEMA)
    assert {(row["kind"], row["shape"]) for row in nulls} == {
        ("empty_prompt", ""), ("negative_prompt", ""), ("face", ""), ("animation_known", "5x48x32")
    }  # fmt: skip
    assert not (root / "rejected.jsonl").exists() and not (root / "clips" / "claims").exists()
    assert all(store.verify(root / part) == [] for part in ("clips", "text", "null"))


def test_nulls_are_what_they_stand_for(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    assert run() == 0
    rows = store.load(tmp_path / "latents" / "null", LATENTS_SCHEMA)
    nulls = {row["kind"]: cell_to_tensor(row["tensor"]) for row in rows}
    encoder = ClipEncoder(ANIMATE, checkpoint, known_variants=0)
    assert torch.equal(nulls["animation_known"], encoder.video(torch.zeros(3, 5, 48, 32)))
    assert nulls["face"].shape == (1, 32)
    assert nulls["empty_prompt"].shape == (1, 64) and len(nulls["negative_prompt"]) > 20


def test_second_run_encodes_only_what_is_new(run: Run, tmp_path: Path, rows: list[dict]) -> None:
    write_clips(tmp_path / "clips", rows[:1])
    assert run() == 0
    first = store.parts(tmp_path / "latents" / "clips")
    with store.PartWriter(tmp_path / "clips", writer="writer1", features=clips_features()) as writer:
        writer.write(rows[1])
        writer.write(clip_row(7, hw=(32, 48)))
    stale = tmp_path / "latents" / "clips" / "claims" / "clips-0"
    stale.parent.mkdir()
    stale.touch()  # of a run that was killed
    assert run() == 0
    parts = store.parts(tmp_path / "latents" / "clips")
    assert {path: parts[path] for path in first} == first
    assert [sidecar.rows for sidecar in parts.values()] == [1, 2]
    assert clip_ids(tmp_path / "latents") == ["square0", "square1", "square7"]
    nulls = store.load(tmp_path / "latents" / "null", LATENTS_SCHEMA)
    assert sorted(row["shape"] for row in nulls if row["kind"] == "animation_known") == ["5x32x48", "5x48x32"]
    assert run() == 0
    assert store.parts(tmp_path / "latents" / "clips") == parts


def test_broken_clip_is_left_out_with_its_reason(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = rows[1] | {"video": {"bytes": rows[1]["video"]["bytes"][:400], "path": None}}
    faceless = rows[2] | {"face_video": None}
    write_clips(tmp_path / "clips", [rows[0], broken, faceless])
    assert run() == 0
    assert clip_ids(tmp_path / "latents") == ["square0"]
    assert run() == 0  # tries them again, and says it once
    entries = [json.loads(line) for line in (tmp_path / "latents" / "rejected.jsonl").read_text().splitlines()]
    reasons = {entry["clip_id"]: entry["reason"] for entry in entries}
    assert len(entries) == 2
    assert "square1 cannot be decoded" in reasons["square1"] and "has no faces" in reasons["square2"]


def test_clip_too_large_for_the_memory_is_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_on("square1", torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    assert run() == 0
    assert clip_ids(tmp_path / "latents") == ["square0", "square2"]
    rejected = json.loads((tmp_path / "latents" / "rejected.jsonl").read_text())
    assert rejected == {"clip_id": "square1", "reason": "CUDA out of memory"}


def test_interrupted_run_keeps_what_it_encoded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_on("square2", KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run()
    root = tmp_path / "latents"
    assert clip_ids(root) == ["square0", "square1"]
    kept = store.parts(root / "clips")
    monkeypatch.undo()
    assert run() == 0
    parts = store.parts(root / "clips")
    assert {path: parts[path] for path in kept} == kept
    assert clip_ids(root) == ["square0", "square1", "square2"] and not (root / "clips" / "claims").exists()


def test_claims_that_are_taken_away_lose_no_clip(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run on a machine whose file system keeps no locks would."""
    load_clip = cache_clips.load_clip

    def load_and_remove(row: dict) -> Clip:
        shutil.rmtree(tmp_path / "latents" / "clips" / "claims")
        return load_clip(row)

    with monkeypatch.context() as patch:
        patch.setattr(cache_clips, "load_clip", load_and_remove)
        assert run() == 2
    assert "claims is gone: another run removed it" in capsys.readouterr().err
    assert clip_ids(tmp_path / "latents") == ["square0"]
    assert run() == 0
    assert clip_ids(tmp_path / "latents") == ["square0", "square1", "square2"]


def test_interrupted_texts_are_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(tmp_path / "clips", [clip_row(number, caption=f"caption {number}") for number in range(9)])
    encode, encoded = TextEncoder.encode, []

    def fail_second(encoder: TextEncoder, texts: list[str]) -> list[torch.Tensor]:
        encoded.append(texts)
        if len(encoded) == 2:
            raise RuntimeError("CUDA error: the GPU has fallen off the bus")
        return encode(encoder, texts)

    monkeypatch.setattr(TextEncoder, "encode", fail_second)
    with pytest.raises(RuntimeError, match="fallen off"):
        run()
    assert sorted(store.load(tmp_path / "latents" / "text", LATENTS_SCHEMA)["caption"]) == sorted(encoded[0])
    assert len(encoded[0]) == 8
    assert run() == 0
    assert [text for texts in encoded[2:] for text in texts] == encoded[1]  # only those are left


def _fail_on(clip_id: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    load_clip = cache_clips.load_clip

    def load_or_fail(row: dict) -> Clip:
        if row["clip_id"] == clip_id:
            raise error
        return load_clip(row)

    monkeypatch.setattr(cache_clips, "load_clip", load_or_fail)


@pytest.mark.launch
def test_run_keeps_others_out_until_it_is_killed_and_the_next_finishes_it(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", rows[:1])
    assert run() == 0
    root = tmp_path / "latents"
    kept = store.parts(root / "clips")
    large = [clip_row(number, num_frames=9, hw=(64, 64)) for number in (4, 5)]
    with store.PartWriter(tmp_path / "clips", writer="writer1", features=clips_features()) as writer:
        for row in large:
            writer.write(row)
    command = [sys.executable, "-m", "wan_accel.cache", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (root / "clips" / "claims" / "clips-0").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        assert run() == 2
        error = capsys.readouterr().err
        assert f"{root} is being written by another run of wan_accel.cache (process {process.pid} on " in error
        assert run("--dry-run") == 0  # writes nothing
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (root / "clips" / "claims" / "clips-0").exists() and clip_ids(root) == ["square0"]
    assert run() == 0
    parts = store.parts(root / "clips")
    assert {path: parts[path] for path in kept} == kept
    assert clip_ids(root) == ["square0", "square4", "square5"]
    assert not (root / "clips" / "claims").exists() and not list(root.glob("**/*.tmp"))


def test_lock_where_the_file_system_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(store.StoreError, match=r"by another run .* remove .*\.cache\.softlock")
    with lone_run(tmp_path), refused, lone_run(tmp_path):
        pass
    with lone_run(tmp_path):
        assert (tmp_path / ".cache.softlock").is_file()
    assert not (tmp_path / ".cache.softlock").exists()


def test_no_clip_at_all_is_an_error(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", [rows[0] | {"face_video": None}])
    assert run() == 2
    assert "no clip could be encoded; the reasons are in" in capsys.readouterr().err


def test_driving_clips_are_refused(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", [rows[0], rows[1] | {"purpose": "drive"}])
    assert run() == 2
    assert "holds clips made with --purpose drive" in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()


def test_a_clip_that_is_there_twice_is_refused(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", [rows[0], rows[1], rows[0]])
    assert run() == 2
    assert f"has 1 clip_ids on several rows, e.g. {rows[0]['clip_id']}: `wan-preprocess" in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / CLIP_FILE).unlink(), f"does not have {CLIP_FILE} \\(encodes reference pictures\\)"),
        (lambda folder: _cut(folder / TEXT_ENCODER_FILE), f"{TEXT_ENCODER_FILE} is damaged or cut short"),
        (lambda folder: _cut(next(folder.glob("*1-of*"))), "00001-of-00002.safetensors is damaged or cut short"),
        (shutil.rmtree, "is not a folder: download Wan-AI/Wan2.2-Animate-14B there"),
    ],
)
def test_spoilt_checkpoint_leaves_nothing_behind(
    run: Run, tmp_path: Path, checkpoint: Path, spoil: Callable, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    spoil(copy)
    assert run(f"model.checkpoint={copy}") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1 and not (tmp_path / "latents").exists()


def test_encoder_that_cannot_be_loaded_stops_and_rejects_no_clip(
    run: Run, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    state = torch.load(copy / CLIP_FILE, weights_only=True)
    del state[next(name for name in state if name.startswith("visual.") and name.endswith("weight"))]
    torch.save(state, copy / CLIP_FILE)
    assert run(f"model.checkpoint={copy}") == 2
    assert CLIP_FILE in capsys.readouterr().err
    assert not (tmp_path / "latents" / "rejected.jsonl").exists()
    assert run() == 0
    assert clip_ids(tmp_path / "latents") == ["square0", "square1", "square2"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def test_output_of_another_variant_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = store.parts(tmp_path / "latents" / "clips")
    init_tiny("t2v-1.3b", tmp_path / "t2v")
    assert run("variant=t2v-1.3b", f"model.checkpoint={tmp_path / 't2v'}") == 2
    assert "was made with other settings (variant: 'animate-14b' there, 't2v-1.3b' now)" in capsys.readouterr().err
    assert store.parts(tmp_path / "latents" / "clips") == before


def test_clips_are_no_output_folder(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data.latents={tmp_path / 'clips'}") == 2
    assert "is itself a dataset of wan-accel: give another folder" in capsys.readouterr().err
    assert not (tmp_path / "clips" / "text").exists()


def test_foreign_folder_is_left_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "latents" / "clips" / "claims" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert run() == 2
    assert "is not empty and was not made by wan-accel" in capsys.readouterr().err
    assert notes.read_text() == "mine"


def test_clips_of_another_schema(
    run: Run, tmp_path: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", rows[:1])
    file = tmp_path / "clips" / store.RUN_FILE
    file.write_text(file.read_text().replace(CLIPS_SCHEMA, "wan-accel/clips@2"))
    assert run() == 2
    assert "has schema 'wan-accel/clips@2', expected 'wan-accel/clips@1'" in capsys.readouterr().err


def test_dry_run_says_the_bytes_and_writes_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("GiB  ")[1].split(" (")[0] for line in lines if "GiB  " in line]
    assert names == [
        "text", "latents", "reference_latents", "pose_latents", "motion_vectors", "known", "clip_features", "in all"
    ]  # fmt: skip
    assert "GPU hours" in lines[-1]
    assert not (tmp_path / "latents").exists()


def test_estimate_is_what_is_written(run: Run, tmp_path: Path, rows: list[dict]) -> None:
    write_clips(tmp_path / "clips", rows)
    recipe = cache.load_recipe(str(tmp_path / "recipe.yaml"))
    sizes = cache.Cache(recipe).estimate().sizes
    assert run() == 0
    stored = store.load(tmp_path / "latents" / "clips", LATENTS_SCHEMA)
    for name in ("latents", "pose_latents"):
        assert sizes[name] == sum(len(row[name]["data"]) for row in stored)
    left = cache.Cache(recipe).estimate()
    assert set(left.sizes.values()) == {0} and left.rewritten == 0


def test_small_disk_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run() == 2
    assert "GiB but 0.00 GiB are free: free some, or use another disk" in capsys.readouterr().err


def test_recipe_without_clips(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data.clips=null") == 2
    assert "data.clips is missing" in capsys.readouterr().err


def test_keys_follow_the_files_they_depend_on(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    before = condition_keys(ANIMATE, copy, known_variants=2)
    assert before == condition_keys(ANIMATE, checkpoint, known_variants=2)
    state = torch.load(copy / CLIP_FILE, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, copy / CLIP_FILE)
    (copy / "google/umt5-xxl/tokenizer.json").write_text("{}")
    after = condition_keys(ANIMATE, copy, known_variants=3)
    assert {name for name in before if before[name] != after[name]} == {"reference", "text", "known"}
    shift_motion_encoder(copy)
    moved = condition_keys(ANIMATE, copy, known_variants=3)
    assert {name for name in after if after[name] != moved[name]} == {"face"}  # the rest of the DiT is in no key
    (copy / ANIMATE.vae.file).unlink()
    assert condition_keys(ANIMATE, copy, known_variants=3).keys() == {"text", "face"}


def shift_motion_encoder(checkpoint: Path) -> None:
    """Change a tensor of Animate's motion encoder, and one of the DiT's first block."""
    for file in checkpoint.glob("diffusion_pytorch_model*.safetensors"):
        state = load_file(file)
        names = [name for name in sorted(state) if name.startswith(MOTION_ENCODER)][:1] + ["blocks.0.ffn.0.weight"]
        save_file({n: t + (n in names) for n, t in state.items()}, file, metadata={"format": "pt"})


@pytest.mark.launch
def test_two_processes_share_the_work(run: Run, tmp_path: Path, rows: list[dict]) -> None:
    write_clips(tmp_path / "clips", [clip_row(number) for number in range(6)])
    config = Path(__file__).parents[1] / "recipes" / "accelerate" / "cpu_fsdp2.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
        "-m", "wan_accel.cache", str(tmp_path / "recipe.yaml"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    root = tmp_path / "latents"
    assert clip_ids(root) == [f"square{number}" for number in range(6)]
    assert len(LatentsDataset(root)) == 6
    writers = {path.parent.name for path in store.parts(root / "text")}
    assert writers == {"rank0", "rank1"}
    before = LatentsDataset(root)
    command.append("cache.known_variants=3")  # of both ranks' parts only that is encoded again, by both
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    after = LatentsDataset(root)
    assert after.clip_ids == before.clip_ids and after.index().num_known == (3,) * 6
    assert all(part.name == "data-00000.r1.arrow" for part in store.parts(root / "clips"))
    assert store.verify(root / "clips") == [] and not (root / "clips" / "claims").exists()
