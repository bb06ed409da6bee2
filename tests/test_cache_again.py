"""The cache run again into the same folder: only what is stale is encoded, whatever was changed, and kills are safe."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from ranks import run_ranks
from tiny_clips import clip_row, write_clips

from wan_accel import cache, cache_clips, cache_texts
from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.schema import LATENTS_SCHEMA
from wan_accel.models.checkpoint_files import condition_keys
from wan_accel.models.conditioning import clips as conditioning
from wan_accel.models.encoders import load_text_encoder
from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE, get_variant
from wan_accel.tiny import init_tiny

ANIMATE = get_variant("animate-14b")
Job = Callable[..., int]
TENSORS = ("latents", "pose_latents", "reference_latents", "clip_features", "motion_vectors", "known")
LOADERS = {"load_vae", "load_clip", "load_motion_encoder", "load_text_encoder"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, three clips, and their conditions in two parts."""
    root = tmp_path_factory.mktemp("made")
    init_tiny("animate-14b", root / "model")
    write_clips(root / "clips", [clip_row(number) for number in range(2)])
    (root / "recipe.yaml").write_text(
        "variant: animate-14b\nmodel: {checkpoint: model}\nmethod: {kind: lora}\n"
        "data: {clips: clips, latents: latents}\ncache: {known_variants: 2}\n"
        "training: {output_dir: run, learning_rate: 1.0e-4, max_steps: 1}\n"
    )
    assert cache.main(arguments(root)) == 0
    write_clips(root / "clips", [clip_row(2)])
    assert cache.main(arguments(root)) == 0
    return root


@pytest.fixture
def job(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Run the cache in a copy of `made`; `loads` names the networks that it may load."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)

    def run(*overrides: str, loads: set[str]) -> int:
        def refuse(name: str) -> Callable:
            def load(*arguments: Any, **options: Any) -> None:
                raise AssertionError(f"{name} is called, but nothing that it makes is stale")

            return load

        with monkeypatch.context() as patch:
            for name in LOADERS - loads:
                patch.setattr(cache_texts if name == "load_text_encoder" else conditioning, name, refuse(name))
            return cache.main(arguments(tmp_path, *overrides))

    return run


def arguments(root: Path, *overrides: str) -> list[str]:
    folders = [f"model.checkpoint={root}/model", f"data.clips={root}/clips", f"data.latents={root}/latents"]
    return [str(root / "recipe.yaml"), *folders, *overrides]


def rows(root: Path) -> list[dict]:
    assert all(store.verify(root / "latents" / part) == [] for part in ("clips", "text", "null"))
    assert not any(store.superseded(root / "latents" / part) for part in ("clips", "text", "null"))
    return list(load_from_disk(str(root / "latents" / "clips")))


def texts(root: Path) -> dict[str, torch.Tensor]:
    found = list(load_from_disk(str(root / "latents" / "text")))
    assert len({row["caption_id"] for row in found}) == len(found)
    return {row["caption"]: cell_to_tensor(row["embeddings"]) for row in found}


def differing(before: list[dict], after: list[dict]) -> set[str]:
    """Tensor columns that differ in any row; the rows are the same clips in the same order."""
    assert [row["clip_id"] for row in after] == [row["clip_id"] for row in before]
    return {name for old, new in zip(before, after) for name in TENSORS if old[name] != new[name]}


def shift_weights(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor * 1.25 for name, tensor in state.items()}, path)


def current_keys(root: Path, known_variants: int = 2) -> dict[str, str]:
    return condition_keys(ANIMATE, root / "model", known_variants=known_variants)


def test_other_known_variants(job: Job, tmp_path: Path) -> None:
    before, before_text = rows(tmp_path), store.parts(tmp_path / "latents" / "text")
    assert len(store.finished(tmp_path / "latents" / "clips")) == 2
    with pytest.raises(LatentsError, match=r"known was encoded with other .* which encodes only that again"):
        LatentsDataset(tmp_path / "latents").check_keys(current_keys(tmp_path, 3))
    assert job("cache.known_variants=3", loads={"load_vae"}) == 0
    after = rows(tmp_path)
    assert differing(before, after) == {"known"}
    assert [row["num_known"] for row in after] == [3, 3, 3]
    assert [row["known"][:2] for row in after] == [row["known"] for row in before]  # the first are drawn as before
    assert store.parts(tmp_path / "latents" / "text") == before_text
    LatentsDataset(tmp_path / "latents").check_keys(current_keys(tmp_path, 3))
    assert job("cache.known_variants=3", loads=set()) == 0


def test_other_text_encoder(job: Job, tmp_path: Path) -> None:
    before, before_clips = texts(tmp_path), store.parts(tmp_path / "latents" / "clips")
    shift_weights(tmp_path / "model" / TEXT_ENCODER_FILE)
    with pytest.raises(LatentsError, match="latents: text was encoded with other"):
        LatentsDataset(tmp_path / "latents").check_keys(current_keys(tmp_path))
    assert job(loads={"load_text_encoder"}) == 0
    after = texts(tmp_path)
    assert after.keys() == before.keys() and store.parts(tmp_path / "latents" / "clips") == before_clips
    encoder = load_text_encoder(tmp_path / "model")
    for caption, states in after.items():
        torch.testing.assert_close(states, encoder.encode([caption])[0], rtol=0.02, atol=0.02)  # of another batch
        assert not torch.allclose(states, before[caption], rtol=0.02, atol=0.02)
    nulls = {row["kind"]: row for row in store.load(tmp_path / "latents" / "null", LATENTS_SCHEMA)}
    assert torch.equal(cell_to_tensor(nulls["empty_prompt"]["tensor"]), after[""])
    dataset = LatentsDataset(tmp_path / "latents")
    dataset.check_keys(current_keys(tmp_path))
    assert dataset.keys == current_keys(tmp_path)


@pytest.mark.parametrize(
    ("file", "loads", "changed"),
    [
        (ANIMATE.vae.file, {"load_vae", "load_clip"}, {"latents", "pose_latents", "reference_latents", "known"}),
        (CLIP_FILE, {"load_vae", "load_clip"}, {"clip_features"}),
    ],
)
def test_other_pictures_encoder(job: Job, tmp_path: Path, file: str, loads: set[str], changed: set[str]) -> None:
    before, before_text = rows(tmp_path), store.parts(tmp_path / "latents" / "text")
    shift_weights(tmp_path / "model" / file)
    assert job(loads=loads) == 0
    assert differing(before, rows(tmp_path)) == changed
    assert store.parts(tmp_path / "latents" / "text") == before_text
    LatentsDataset(tmp_path / "latents").check_keys(current_keys(tmp_path))


def test_caption_changed_in_place(job: Job, tmp_path: Path) -> None:
    before, first = rows(tmp_path), store.finished(tmp_path / "latents" / "clips")[0]
    shutil.rmtree(tmp_path / "clips")
    write_clips(tmp_path / "clips", [clip_row(0), clip_row(1), clip_row(2, caption="something else")])
    assert job(loads={"load_text_encoder"}) == 0
    after = rows(tmp_path)
    assert differing(before, after) == set() and first in store.finished(tmp_path / "latents" / "clips")
    assert [row["caption"] for row in after] == [*(row["caption"] for row in before[:2]), "something else"]
    assert after[2]["caption_id"] == caption_id("something else")
    assert LatentsDataset(tmp_path / "latents").index().num_known == (2, 2, 2) and "something else" in texts(tmp_path)


def test_clip_made_anew_under_its_name(job: Job, tmp_path: Path) -> None:
    before = rows(tmp_path)
    shutil.rmtree(tmp_path / "clips")
    other = clip_row(7)
    anew = [
        clip_row(0),
        clip_row(1, video=other["video"], settings_hash="new"),  # its target alone
        clip_row(2, settings_hash="new"),  # by other settings that made no difference
    ]
    write_clips(tmp_path / "clips", anew)
    assert job(loads={"load_vae"}) == 0
    after = rows(tmp_path)
    assert after[0] == before[0] and differing(before[2:], after[2:]) == set()
    assert differing(before[:2], after[:2]) == {"latents", "known"}
    assert job(loads=set()) == 0 and rows(tmp_path) == after  # settled
    shutil.rmtree(tmp_path / "latents")
    assert job(loads=LOADERS) == 0
    fresh = {row["clip_id"]: row for row in rows(tmp_path)}
    assert fresh == {row["clip_id"]: row for row in after}


def test_clip_that_is_gone_goes_when_stale(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(tmp_path / "clips")
    write_clips(tmp_path / "clips", [clip_row(0), clip_row(2)])
    assert job(loads=set()) == 0
    assert "has 1 clips that are no longer in data.clips" in caplog.text and "trained on (square1)" in caplog.text
    caplog.clear()
    assert [row["clip_id"] for row in rows(tmp_path)] == ["square0", "square1", "square2"]
    assert job("cache.known_variants=1", loads={"load_vae"}) == 0
    assert [row["clip_id"] for row in rows(tmp_path)] == ["square0", "square2"] and "are trained on" not in caplog.text


def test_other_clips_are_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "clips")
    write_clips(tmp_path / "clips", [clip_row(8)])
    before = rows(tmp_path)
    assert job(loads=set()) == 2
    assert "holds conditions of other clips than data.clips" in capsys.readouterr().err
    assert rows(tmp_path) == before


def test_stale_clip_that_cannot_be_encoded(job: Job, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "clips")
    write_clips(tmp_path / "clips", [clip_row(0), clip_row(1) | {"face_video": None}, clip_row(2)])
    assert job(loads={"load_motion_encoder"}) == 0
    assert [row["clip_id"] for row in rows(tmp_path)] == ["square0", "square2"]
    assert "has no faces" in (tmp_path / "latents" / "rejected.jsonl").read_text()


def killed_run(folder: str) -> None:
    """Encode with three variants, and die without a trace at the second part."""
    load_clip = cache_clips.load_clip

    def load_or_die(row: dict) -> Any:
        if row["clip_id"] == "square2":
            os._exit(9)
        return load_clip(row)

    cache_clips.load_clip = load_or_die
    cache.main(arguments(Path(folder), "cache.known_variants=3"))


def test_killed_run_goes_on(job: Job, tmp_path: Path) -> None:
    before = rows(tmp_path)
    with pytest.raises(EOFError):
        run_ranks(killed_run, 1, str(tmp_path), engine="single")
    clips = tmp_path / "latents" / "clips"
    halfway = list(load_from_disk(str(clips)))  # whole files, one part of each
    assert [row["num_known"] for row in halfway] == [3, 3, 2]
    unfinished = clips / "parts" / "rank0" / "data-00001.r1.arrow.tmp"
    unfinished.write_bytes(b"of a part with more batches")
    with pytest.raises(LatentsError, match="known was encoded with other"):
        LatentsDataset(tmp_path / "latents").check_keys(current_keys(tmp_path, 3))
    first = store.finished(clips)[0]
    stamp = first.stat().st_mtime_ns
    assert job("cache.known_variants=3", loads={"load_vae"}) == 0
    after = rows(tmp_path)
    assert differing(before, after) == {"known"} and [row["num_known"] for row in after] == [3, 3, 3]
    assert first.stat().st_mtime_ns == stamp  # not encoded again
    assert not unfinished.exists()


def test_dry_run_tells_what_is_stale(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows(tmp_path)
    assert job("cache.known_variants=3", "--dry-run", loads=set()) == 0
    out = capsys.readouterr().out
    assert "parts written again, of which only stale columns are encoded" in out
    assert rows(tmp_path) == before
    recipe = cache.load_recipe(*arguments(tmp_path)[:1], arguments(tmp_path, "cache.known_variants=3")[1:])
    estimate = cache.Cache(recipe).estimate()
    assert {name for name, size in estimate.sizes.items() if size} == {"known (at most)"}
    assert estimate.rewritten == sum(part.stat().st_size for part in store.finished(tmp_path / "latents" / "clips"))


def test_disk_needs_room_for_what_is_new_alone(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another VAE: all latents are written again, but old ones go, so that two parts are there twice, not all."""
    shift_weights(tmp_path / "model" / ANIMATE.vae.file)
    before = rows(tmp_path)
    stale = [row[name] for row in before for name in ("latents", "pose_latents", "reference_latents", "clip_features")]
    known = [variant["latents"] for row in before for variant in row["known"]]
    recipe = cache.load_recipe(*arguments(tmp_path)[:1], arguments(tmp_path)[1:])
    estimate = cache.Cache(recipe).estimate()
    assert estimate.replaced == sum(len(cell["data"]) for cell in [*stale, *known] if cell is not None)
    assert estimate.again == estimate.total  # known at most, as plain variants store nothing
    excess = len(before[0]["latents"]["data"]) * sum(cell is None for cell in known)
    excess += 3 * 257 * (1280 - 64) * 2  # the estimate has CLIP at its released width
    assert estimate.again - estimate.replaced == excess
    assert estimate.peak(1) == excess + estimate.rewritten  # two small parts: both are there twice
    many = replace(estimate, rewritten=100 * estimate.largest_part)
    assert [many.peak(n) - excess for n in (1, 8)] == [2 * estimate.largest_part, 16 * estimate.largest_part]
    smaller = replace(many, replaced=3 * estimate.again)
    assert smaller.peak(1) == 2 * estimate.largest_part
    more = replace(smaller, sizes={**estimate.sizes, "latents": estimate.sizes["latents"] + 9 * estimate.again})
    assert more.peak(1) == 7 * estimate.again  # new clips go where the others shrank
    for free, code in ((estimate.peak(1) - 1, 2), (estimate.peak(1), 0)):
        usage = shutil.disk_usage("/")._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
            assert job("--dry-run", loads=set()) == code
    assert "free some, or use another disk" in capsys.readouterr().err
