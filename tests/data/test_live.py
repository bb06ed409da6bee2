"""Conditions encoded during training: the cached ones where nothing is drawn, distributed as stated where it is."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clips import clip_row, write_clips

from wan_accel import cache, train
from wan_accel.data.cells import LatentsError
from wan_accel.data.clips import load_clip
from wan_accel.data.collate import collate, share_memory
from wan_accel.data.hooks import horizontal_flip, load_hook
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.live import LiveSource
from wan_accel.draws import SampleDraw
from wan_accel.models.conditioning.animate import GUIDANCE_FRAMES, to_pixels
from wan_accel.models.conditioning.live import LiveEncoder
from wan_accel.models.encoders import load_text_encoder, load_vae
from wan_accel.models.variants import get_variant
from wan_accel.step_plan import StepPlan
from wan_accel.tiny import init_tiny

ANIMATE = get_variant("animate-14b")


def darken(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale by 1 / 1 or 1 / 2, half of the times each."""
    return frames // int(rng.integers(1, 3))


def shuffle_words(caption: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(caption.split()))


def count_words(caption: str, rng: np.random.Generator) -> int:
    return len(caption.split())


def crop(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return frames[:, 1:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Animate: two clips of 9 frames, so that all guidance lengths fit, and their cached conditions."""
    folder = tmp_path_factory.mktemp("live")
    init_tiny("animate-14b", folder / "model")
    write_clips(folder / "clips", [clip_row(n, num_frames=9) for n in range(2)])
    (folder / "recipe.yaml").write_text(
        f"variant: animate-14b\nmodel: {{checkpoint: {folder}/model}}\nmethod: {{kind: lora, r: 4}}\n"
        f"data: {{clips: {folder}/clips, latents: {folder}/latents}}\ncache: {{known_variants: 1}}\n"
        f"training: {{output_dir: {folder}/run, max_steps: 2, dataloader_num_workers: 0, logging_steps: 1}}\n"
    )
    assert cache.main([str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def cached(root: Path) -> LatentsDataset:
    return LatentsDataset(root / "latents")


@pytest.fixture(scope="module")
def encoder(root: Path) -> LiveEncoder:
    texts, vae = load_text_encoder(root / "model"), load_vae(root / "model", ANIMATE)
    return LiveEncoder(vae, texts, encodes_video=True, reference_frames=1)


def live(root: Path, cached: LatentsDataset, *kinds: str, **hooks) -> LiveSource:
    return LiveSource(cached, root / "clips", kinds=kinds, **hooks)


def draw(index: int = 0, noise_seed: int = 11, **changes) -> SampleDraw:
    return SampleDraw(**{"index": index, "epoch": 0, "sigma": 0.5, "noise_seed": noise_seed, **changes})


def test_without_hooks_inputs_are_the_cached_ones(root: Path, cached: LatentsDataset, encoder: LiveEncoder) -> None:
    draws = [draw(0), draw(1, drop_caption=True, drop_face=True)]
    expected = collate(cached, draws)
    fresh = encoder(collate(live(root, cached, "video", "text"), draws))
    assert fresh.keys() == expected.keys()
    for name in fresh:
        tolerance = 0.02 if name == "text" else 0  # bf16 of another batch
        torch.testing.assert_close(fresh[name], expected[name], rtol=tolerance, atol=tolerance)


def test_known_pixels_equal_the_caches(root: Path, cached: LatentsDataset, encoder: LiveEncoder) -> None:
    """A drawn variant gives the condition that the cache would have stored for it."""
    from wan_accel.models.conditioning.animate import grow_mask, join_condition, known_mask, known_pixels

    source = live(root, cached, "known")
    seen = set()
    for seed in range(24):
        row = source._clips[int(source._rows[0])]
        clip = load_clip(row)
        variant = source.known_variant(clip, row["modes"], draw(noise_seed=seed))
        if (variant.mode, variant.guidance_frames) in seen:
            continue
        seen.add((variant.mode, variant.guidance_frames))
        grown = grow_mask(clip.mask, variant) if variant.mode == "replacement" else None
        frames = to_pixels(clip.frames_rgb)
        latents = encoder.vae.encode(known_pixels(frames, grown, variant)[None])[0].to(torch.bfloat16)
        plain = cached.sample(0, draw())
        expected = join_condition(plain["latents"][:, :1], known_mask(grown, variant, 9, (6, 4)), latents)
        fresh = encoder(collate(source, [draw(noise_seed=seed)]))
        assert torch.equal(fresh["condition"][0], expected), variant
    assert len(seen) == 2 * len(GUIDANCE_FRAMES)


def test_distribution_of_known_reaches_the_denoiser(root: Path, cached: LatentsDataset, encoder: LiveEncoder) -> None:
    """Modes and guidance lengths, read off the mask channels of 300 epochs' inputs, are uniform as stated."""
    source = live(root, cached, "known")
    plan = StepPlan(cached.index(), seed=5, global_batch=2)
    found: Counter[tuple[bool, int]] = Counter()
    for step in range(150):
        for micro in plan.step(step, 1).micro_steps:
            mask = collate(source, micro.samples[0])["live_mask"]  # what becomes the condition's first 4 channels
            for channels in mask:
                whole = [bool(channels.transpose(0, 1).flatten(0, 1)[3:][t].all()) for t in range(9)]
                guidance = max(length for length in GUIDANCE_FRAMES if all(whole[:length]))
                found[bool(channels[:, -1].any()), guidance] += 1
    expected = 300 / 6
    assert len(found) == 6 and sum((n - expected) ** 2 / expected for n in found.values()) < 20.5  # chi2, 5, p 0.001
    batch = encoder(collate(source, plan.step(0, 1).micro_steps[0].samples[0]))
    raw = collate(source, plan.step(0, 1).micro_steps[0].samples[0])
    assert torch.equal(batch["condition"][:, :4, 1:], raw["live_mask"].to(torch.bfloat16))


def test_draws_repeat_and_differ_between_epochs(root: Path, cached: LatentsDataset) -> None:
    source = live(root, cached, "video", "text", "known", augment=darken, augment_caption=shuffle_words)
    plan = StepPlan(cached.index(), seed=5, global_batch=1)

    def of_row(epoch: int) -> list[torch.Tensor]:
        draws = [plan.step(step, 1).micro_steps[0].samples[0][0] for step in (2 * epoch, 2 * epoch + 1)]
        sample = source.sample(0, next(d for d in draws if d.index == 0))
        return [sample[name] for name in sorted(sample) if name.startswith("live_")]

    epochs = [of_row(epoch) for epoch in range(8)]
    for again, first in zip(of_row(3), epochs[3], strict=True):
        assert torch.equal(again, first)
    for column in zip(*epochs):
        assert any(not torch.equal(column[0], other) for other in column[1:])


def test_augmented_frames_reach_the_denoiser(root: Path, cached: LatentsDataset, encoder: LiveEncoder) -> None:
    source = live(root, cached, "video", augment=darken)
    clip = load_clip(source._clips[int(source._rows[0])])
    expected = [encoder.vae.encode(to_pixels(clip.frames_rgb // n)[None]).to(torch.bfloat16) for n in (1, 2)]
    counts = [0, 0]
    for seed in range(60):
        frames = source.sample(0, draw(noise_seed=seed))["live_frames"].numpy()
        counts[0 if np.array_equal(frames, clip.frames_rgb) else 1] += 1
    assert 15 < counts[1] < 45
    fresh = {float(encoder(collate(source, [draw(noise_seed=seed)]))["latents"][0, :, 1:].sum()) for seed in range(6)}
    assert fresh == {float(latents.sum()) for latents in expected}
    first = encoder(collate(source, [draw()]))["latents"]
    assert torch.equal(first[0, :, :1], cached.sample(0, draw())["latents"][:, :1])  # the reference stays


def test_captions_reach_the_text_encoder(root: Path, cached: LatentsDataset, encoder: LiveEncoder) -> None:
    source = live(root, cached, "text", augment_caption=shuffle_words)
    captions = {bytes(source.sample(0, draw(noise_seed=s))["live_caption"].tolist()).decode() for s in range(8)}
    assert len(captions) > 3 and len({tuple(sorted(caption.split())) for caption in captions}) == 1
    batch = encoder(collate(source, [draw(), draw(1, drop_caption=True)]))
    dropped = batch["text"][1]
    torch.testing.assert_close(dropped[:1], cached.sample(0, draw(drop_caption=True))["text"], rtol=0.02, atol=0.02)
    assert not dropped[1:].any()


def test_trainer_runs_on_fresh_conditions(root: Path) -> None:
    overrides = [
        "data.on_the_fly=[video, text, known]", f"data.augment={__name__}:darken", "validation.every_steps=1",
        f"data.augment_caption={__name__}:shuffle_words", f"training.output_dir={root}/live",
    ]  # fmt: skip
    trainer = train.build_trainer(train.load_recipe(str(root / "recipe.yaml"), overrides))
    inputs = []
    hook = lambda _, args, kwargs: inputs.append(kwargs) if trainer.model.training else None  # noqa: E731
    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    trainer.train()
    assert trainer.state.global_step == 2 and len(inputs) == 2
    assert trainer.get_train_dataloader().worker_init_fn is share_memory
    source, encode = trainer.live
    for step, given in enumerate(inputs):
        expected = encode(collate(source, trainer.plan.step(step, 1).micro_steps[0].samples[0]))
        assert not any(name.startswith("live_") for name in given)
        for name in ("condition", "text", "pose_latents"):
            assert torch.equal(given[name], expected[name]), name


def test_what_cannot_be_encoded_on_the_fly(root: Path, cached: LatentsDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.augment made uint8 \(9, 47, 32, 3\) of clip square0: it must return"):
        live(root, cached, "video", augment=crop).sample(0, draw())
    write_clips(tmp_path / "clips", [clip_row(0, num_frames=9)])
    with pytest.raises(LatentsError, match=r"does not have 1 clips of .* \(the first: square1\)"):
        LiveSource(cached, tmp_path / "clips", kinds=["video"])
    for name in ("nowhere:f", "numpy:nothing", "numpy"):
        with pytest.raises(ValueError, match=f"data.augment={name} cannot be imported"):
            load_hook(name, "data.augment")
    with pytest.raises(ValueError, match="is not a function"):
        load_hook("numpy:pi", "data.augment")


def test_clips_that_were_made_anew_are_refused(root: Path, cached: LatentsDataset, tmp_path: Path) -> None:
    """Matched by name alone, their frames would be trained on under the conditions and shapes of the old ones."""
    rows = [clip_row(0, num_frames=9), clip_row(1, num_frames=9), clip_row(2)]
    write_clips(tmp_path / "same", rows[::-1] + [clip_row(3)])  # in any order, and more of them
    source = LiveSource(cached, tmp_path / "same", kinds=["video"])
    expected = live(root, cached, "video").sample(1, draw(1))["live_frames"]
    assert torch.equal(source.sample(1, draw(1))["live_frames"], expected)
    anew = [clip_row(0, num_frames=5), clip_row(1, num_frames=9, settings_hash="other")]
    write_clips(tmp_path / "anew", anew)
    with pytest.raises(
        LatentsError,
        match=r"2 clips of data\.clips=.*anew are not those that .*latents was made of \(square0: 9 frames of 48x32 "
        r"were cached, it has 5 frames of 48x32; square1: made anew\): run wan_accel\.cache with this recipe",
    ):
        LiveSource(cached, tmp_path / "anew", kinds=["video"])
    chosen = LatentsDataset(root / "latents", where="clip_id = square1")  # what is left out may differ
    write_clips(tmp_path / "other", [anew[0], rows[1]])
    assert len(LiveSource(chosen, tmp_path / "other", kinds=["video"]).cached) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.augment=nowhere:f",), r"data\.augment=nowhere:f cannot be imported"),
        ((f"data.augment={__name__}:crop",), r"data\.augment made uint8 \(9, 47, 32, 3\) of clip square0"),
        ((f"data.augment_caption={__name__}:count_words",), r"data\.augment_caption made int of 'a square"),
        (("data.clips={tmp}/clips",), "data.on_the_fly: data.clips=.* does not have 1 clips of"),
        (("model.checkpoint={tmp}/model",), "model does not have Wan2.1_VAE.pth"),
    ],
)
def test_settings_are_refused_before_weights_are_read(
    root: Path, tmp_path: Path, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights are opened")

    monkeypatch.setattr(train, "open_weights", refuse)
    write_clips(tmp_path / "clips", [clip_row(0, num_frames=9)])
    shutil.copytree(root / "model", tmp_path / "model")
    (tmp_path / "model" / ANIMATE.vae.file).unlink()
    on_the_fly = ["data.on_the_fly=[video, text, known]", *(text.format(tmp=tmp_path) for text in overrides)]
    with pytest.raises(ValueError, match=message):
        train.build_trainer(train.load_recipe(str(root / "recipe.yaml"), on_the_fly))


def test_flip_is_built_in() -> None:
    assert load_hook("horizontal_flip", "data.augment") is horizontal_flip
    frames = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    found = [horizontal_flip(frames, np.random.default_rng(seed)) for seed in range(40)]
    flips = sum(np.array_equal(some, frames[:, :, ::-1]) for some in found)
    assert 8 < flips < 32 and all(np.array_equal(f, frames) or np.array_equal(f, frames[:, :, ::-1]) for f in found)
