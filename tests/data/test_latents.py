"""Tensors in cells, and the denoiser's inputs that draws make of a latents folder written by the cache."""

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_clips import clip_row, write_clips
from torch.utils.data import DataLoader, Dataset

from wan_accel.cache import main
from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.data.cells import LatentsError, cell_to_tensor, tensor_to_cell
from wan_accel.data.collate import SampleError, StepDataset, collate, share_memory
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.schema import LATENTS_SCHEMA, latents_features, null_features
from wan_accel.draws import NO_KNOWN, Bucket, SampleDraw
from wan_accel.models.loading import load_wan
from wan_accel.models.variants import get_variant
from wan_accel.step_plan import StepPlan
from wan_accel.tiny import init_tiny

RECIPE = """
variant: {variant}
model: {{checkpoint: {checkpoint}}}
method: {{kind: lora}}
data: {{clips: {clips}, latents: {latents}}}
cache: {{known_variants: 6}}
training: {{output_dir: {latents}/run, learning_rate: 1.0e-4, max_steps: 1}}
"""


def make_latents(root: Path, variant: str, *, rows: list[dict]) -> Path:
    """A checkpoint, clips, and what the cache makes of them."""
    init_tiny(variant, root / "model")
    write_clips(root / "clips", rows)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(variant=variant, checkpoint=root / "model", clips=root / "clips", latents=root / "latents")
    )
    assert main([str(recipe)]) == 0
    return root / "latents"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [clip_row(0), clip_row(1, num_frames=9), clip_row(2)]
    return make_latents(tmp_path_factory.mktemp("animate"), "animate-14b", rows=rows)


@pytest.fixture(scope="module")
def dataset(latents: Path) -> LatentsDataset:
    return LatentsDataset(latents)


def draw(index: int = 0, **changes) -> SampleDraw:
    return SampleDraw(**{"index": index, "epoch": 0, "sigma": 0.5, "noise_seed": 11, **changes})


def stored(dataset: LatentsDataset, index: int, column: str) -> torch.Tensor:
    return cell_to_tensor(store.load(dataset.root / "clips", LATENTS_SCHEMA)[index][column])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (1,), ()])
def test_cells_keep_tensors_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    cell = tensor_to_cell(tensor.t() if tensor.ndim == 2 else tensor)
    back = cell_to_tensor(cell)
    assert back.dtype == dtype
    assert torch.equal(back.t() if tensor.ndim == 2 else back, tensor)


def test_cell_of_another_length_is_refused() -> None:
    cell = tensor_to_cell(torch.zeros(4)) | {"shape": [5]}
    with pytest.raises(ValueError, match=r"16 bytes, expected shape \[5\] of float32"):
        cell_to_tensor(cell)


def test_index_describes_the_rows(dataset: LatentsDataset) -> None:
    index = dataset.index()
    by_id = dict(zip(dataset.clip_ids, index.buckets))
    assert by_id == {"square0": Bucket(5, 48, 32), "square1": Bucket(9, 48, 32), "square2": Bucket(5, 48, 32)}
    assert index.num_known == (6, 6, 6)
    assert len(set(dataset.group_ids)) == len(dataset) == 3


def test_sample_has_the_reference_in_front(dataset: LatentsDataset) -> None:
    sample = dataset.sample(0, draw())
    assert {name: tuple(tensor.shape) for name, tensor in sample.items() if name != "text"} == {
        "latents": (16, 3, 6, 4), "noise": (16, 3, 6, 4), "condition": (20, 3, 6, 4), "clip_features": (257, 64),
        "pose_latents": (16, 2, 6, 4), "motion_vectors": (5, 32),
    }  # fmt: skip
    assert torch.equal(sample["latents"][:, :1], stored(dataset, 0, "reference_latents"))
    assert torch.equal(sample["latents"][:, 1:], stored(dataset, 0, "latents"))
    for name in ("pose_latents", "clip_features", "motion_vectors"):
        assert torch.equal(sample[name], stored(dataset, 0, name))


def test_condition_of_every_known_variant(dataset: LatentsDataset) -> None:
    known = store.load(dataset.root / "clips", LATENTS_SCHEMA)[0]["known"]
    plain = dataset.sample(0, draw(known=NO_KNOWN))["condition"]
    for number, row in enumerate(known):
        condition = dataset.sample(0, draw(known=number))["condition"]
        assert torch.equal(condition[:, :1], plain[:, :1])
        if row["latents"] is None:
            assert torch.equal(condition, plain)
            continue
        bits = np.unpackbits(np.frombuffer(row["mask_bits"], np.uint8), count=4 * 2 * 6 * 4).reshape(4, 2, 6, 4)
        np.testing.assert_array_equal(condition[:4, 1:].float().numpy(), bits)
        assert torch.equal(condition[4:, 1:], cell_to_tensor(row["latents"]))
    assert {row["latents"] is None for row in known} == {True, False}


def test_plain_condition_knows_only_the_reference(dataset: LatentsDataset) -> None:
    condition = dataset.sample(0, draw())["condition"]
    assert (condition[:4, 0] == 1).all() and not condition[:4, 1:].any()
    assert torch.equal(condition[4:, :1], stored(dataset, 0, "reference_latents"))


def test_dropped_caption_becomes_the_empty_prompt(dataset: LatentsDataset) -> None:
    texts = {
        row["caption_id"]: cell_to_tensor(row["embeddings"])
        for row in store.load(dataset.root / "text", LATENTS_SCHEMA)
    }
    row = store.load(dataset.root / "clips", LATENTS_SCHEMA)[0]
    assert torch.equal(dataset.sample(0, draw())["text"], texts[row["caption_id"]])
    dropped = dataset.sample(0, draw(drop_caption=True))["text"]
    assert dropped.shape == (1, 64)  # the end token alone
    assert torch.equal(dropped, texts[caption_id("")])


def test_dropped_face_is_the_same_in_every_frame(dataset: LatentsDataset) -> None:
    kept, dropped = (dataset.sample(0, draw(drop_face=drop))["motion_vectors"] for drop in (False, True))
    assert kept.shape == dropped.shape and not torch.equal(kept, dropped)
    assert (dropped == dropped[:1]).all()
    assert torch.equal(dropped[:1], dataset.sample(1, draw(1, drop_face=True))["motion_vectors"][:1])


def test_noise_follows_its_seed_alone(dataset: LatentsDataset) -> None:
    first = dataset.sample(0, draw())["noise"]
    assert first.dtype == torch.float32
    assert torch.equal(first, dataset.sample(2, draw(2))["noise"])
    assert not torch.equal(first, dataset.sample(0, draw(noise_seed=12))["noise"])


def test_samples_of_a_bucket_run_through_the_denoiser(dataset: LatentsDataset, latents: Path) -> None:
    rows = [row for row, bucket in enumerate(dataset.index().buckets) if bucket.num_frames == 5]
    batch = collate(dataset, [draw(row, known=number) for number, row in enumerate(rows)])
    assert batch["latents"].shape == (2, 16, 3, 6, 4)
    model = load_wan("animate-14b", latents.parent / "model")
    inputs = {name: batch[name] for name in ("condition", "clip_features", "pose_latents", "motion_vectors")}
    with torch.no_grad():
        velocity = model(batch["noise"], 1000 * batch["sigma"], batch["text"], **inputs)
    assert velocity.shape == batch["latents"].shape and velocity.isfinite().all()


@pytest.mark.parametrize(
    ("column", "shape", "message"),
    [
        ("latents", (16, 3, 6, 4), r"latents \(16, 3, 6, 4\) where the bucket of 5 frames of 48x32 needs \(16, 2, .*"),
        ("pose_latents", (16, 2, 6, 6), r"pose_latents \(16, 2, 6, 6\) where .* needs \(16, 2, 6, 4\)"),
        ("motion_vectors", (9, 32), r"motion_vectors \(9, 32\) where .* needs \(5, 32\)"),
        ("reference_latents", (16, 1, 4, 4), r"reference_latents \(16, 1, 4, 4\) where .* needs \(16, 1, 6, 4\)"),
        ("known", (16, 3, 6, 4), r"known latents \(16, 3, 6, 4\) where .* needs \(16, 2, 6, 4\)"),
    ],
)
def test_a_row_that_contradicts_its_bucket(
    latents: Path, tmp_path: Path, column: str, shape: tuple[int, ...], message: str
) -> None:
    for part in ("text", "null"):
        (tmp_path / part).symlink_to(latents / part)
    with store.PartWriter(tmp_path / "clips", writer="rank0", features=latents_features()) as writer:
        row = next(row for row in store.load(latents / "clips", LATENTS_SCHEMA) if row["num_frames"] == 5)
        cell = tensor_to_cell(torch.zeros(shape, dtype=torch.bfloat16))
        known = [variant | {"latents": cell} for variant in row["known"]]
        writer.write(row | ({"known": known} if column == "known" else {column: cell}))
    dataset = LatentsDataset(tmp_path, variant=get_variant("animate-14b"))
    advice = r": the row was written by something else; encode into a new data\.latents folder"
    with pytest.raises(LatentsError, match=rf"clip square\d \(row 0\): {message}{advice}"):
        dataset.sample(0, draw(known=0))
    good = LatentsDataset(latents, variant=get_variant("animate-14b"))
    for number in range(6):
        good.sample(0, draw(known=number))  # among them variants of which nothing is known


def test_text_to_video_has_no_more_than_latents_and_text(tmp_path: Path) -> None:
    dataset = LatentsDataset(make_latents(tmp_path, "t2v-1.3b", rows=[clip_row(0), clip_row(1)]))
    sample = dataset.sample(0, draw(drop_caption=True))
    assert sample.keys() == {"latents", "noise", "text"}
    assert sample["latents"].shape == (16, 2, 6, 4)
    assert dataset.index().num_known == (0, 0)


def test_image_to_video_knows_its_first_frame(tmp_path: Path) -> None:
    """Mask and latents of the first frame, and CLIP features; the mask is not stored."""
    dataset = LatentsDataset(make_latents(tmp_path, "i2v-14b-480p", rows=[clip_row(0), clip_row(1)]))
    batch = collate(dataset, [draw(0), draw(1, drop_image=True)])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items() if name != "text"} == {
        "latents": (2, 16, 2, 6, 4), "noise": (2, 16, 2, 6, 4), "condition": (2, 20, 2, 6, 4),
        "clip_features": (2, 257, 64), "sigma": (2,), "weight": (2,), "drop_image": (2,),
    }  # fmt: skip
    assert batch["drop_image"].tolist() == [False, True]
    assert (batch["condition"][:, :4, 0] == 1).all() and not batch["condition"][:, :4, 1:].any()
    assert torch.equal(batch["condition"][1, 4:], stored(dataset, 1, "image_latents"))
    assert torch.equal(batch["condition"][:, 4:, 0], batch["latents"][:, :, 0])  # the VAE is causal
    assert {name for name, key in dataset.keys.items() if key} == {"text", "video", "image"}


def test_rows_that_do_not_fit_together_say_what_to_do(dataset: LatentsDataset) -> None:
    """The cache would pass over both, as they have the right keys."""
    with pytest.raises(
        SampleError,
        match=r"row 1 has latents of shape \(16, 4, 6, 4\), but row 0 of the same bucket has \(16, 3, 6, 4\): one of "
        r"them was written by something else; encode into a new data\.latents folder",
    ):
        collate(dataset, [draw(0), draw(1)])  # buckets of 5 and 9 frames


def test_null_row_that_was_not_cached(latents: Path, tmp_path: Path) -> None:
    for part in ("clips", "text"):
        (tmp_path / part).symlink_to(latents / part)
    with store.PartWriter(tmp_path / "null", writer="rank0", features=null_features()) as writer:
        row = next(iter(store.load(latents / "null", LATENTS_SCHEMA)))
        writer.write(row | {"kind": "negative_prompt"})
    dataset = LatentsDataset(tmp_path)
    with pytest.raises(LatentsError, match=r"null has no empty_prompt: run wan_accel\.cache on it again, or set the"):
        dataset.sample(0, draw(drop_caption=True))


def test_stale_keys_are_named(dataset: LatentsDataset) -> None:
    keys = dataset.keys
    assert keys.keys() == {"text", "video", "pose", "reference", "face", "known"} and all(keys.values())
    dataset.check_keys(keys)
    with pytest.raises(LatentsError, match="face, video was encoded with other weights or settings than this recipe's"):
        dataset.check_keys(keys | {"video": "0", "face": "1"})


@pytest.mark.parametrize(("part", "named"), [("text", "text"), ("clips", "known, video"), ("null", "face")])
def test_rows_of_an_interrupted_run_are_not_mixed(
    dataset: LatentsDataset, latents: Path, tmp_path: Path, part: str, named: str
) -> None:
    """With a checkpoint that lacks the encoders nothing tells which rows are right, so all have to be of one."""
    for other in {"clips", "text", "null"} - {part}:
        (tmp_path / other).symlink_to(latents / other)
    rows = store.load(latents / part, LATENTS_SCHEMA)
    with store.PartWriter(tmp_path / part, writer="rank0", features=rows.features) as writer:
        for number, row in enumerate(rows):
            if part == "text":
                writer.write(row | {"key": "0", "embeddings": tensor_to_cell(torch.zeros(1, 64))})
                writer.write(row)
            elif part == "clips":
                writer.write(row | {"keys": row["keys"] | {"video": str(min(number, 1)), "known": str(min(number, 1))}})
            else:
                writer.write(row | ({"key": "0"} if row["kind"] == "face" else {}))
    mixed = LatentsDataset(tmp_path)
    message = rf": {named} is in part of other weights or settings than the rest, since a run of wan_accel\.cache has"
    for use in (lambda: mixed.check_keys({}), lambda: mixed.keys, lambda: mixed.sample(0, draw())):
        with pytest.raises(LatentsError, match=message):
            use()
    if part == "text":  # the recipe's encoder tells which are right
        mixed.check_keys(dataset.keys)
        assert mixed.keys == dataset.keys
        assert torch.equal(mixed.sample(1, draw(1))["text"], dataset.sample(1, draw(1))["text"])
        with pytest.raises(LatentsError, match="text was encoded with other weights"):
            mixed.check_keys(dataset.keys | {"text": "1"})


def test_clips_without_their_texts(latents: Path, tmp_path: Path) -> None:
    for part in ("clips", "null"):
        (tmp_path / part).symlink_to(latents / part)
    texts = store.load(latents / "text", LATENTS_SCHEMA)
    with store.PartWriter(tmp_path / "text", writer="rank0", features=texts.features) as writer:
        writer.write(next(row for row in texts if row["caption"] == ""))
    with pytest.raises(LatentsError, match=r"has no text for 3 clips: run wan_accel\.cache on it again"):
        LatentsDataset(tmp_path)


def test_null_rows_reach_the_denoiser_as_often_as_the_recipe_says(dataset: LatentsDataset) -> None:
    """What a run of 300 samples is fed, on two data ranks: each null where the plan drops it, as often as asked."""
    rates = {"text": 0.1, "motion_vectors": 0.3}
    plan = StepPlan(
        dataset.index(), seed=5, global_batch=3, caption_dropout=rates["text"], face_dropout=rates["motion_vectors"]
    )
    nulls = {
        "text": dataset.sample(0, draw(drop_caption=True))["text"][0],
        "motion_vectors": dataset.sample(0, draw(drop_face=True))["motion_vectors"][0],
    }
    counts, num_samples = dict.fromkeys(rates, 0), 0
    shares = [StepDataset(dataset, plan, data_rank=rank, num_data_ranks=2) for rank in range(2)]
    for item in (share[step] for step in range(100) for share in shares):
        for batch in item["micro_batches"]:
            taken = batch["weight"] > 0  # the others are fillers
            num_samples += int(taken.sum())
            for name, null in nulls.items():
                counts[name] += int(((batch[name][:, 0] == null).flatten(1).all(1) & taken).sum())
    assert num_samples == 300
    draws = [d for step in range(100) for micro in plan.step(step, 1).micro_steps for d in micro.samples[0]]
    assert counts == {
        "text": sum(d.drop_caption for d in draws), "motion_vectors": sum(d.drop_face for d in draws),
    }  # fmt: skip
    for name, rate in rates.items():
        deviation = (num_samples * rate * (1 - rate)) ** 0.5
        assert abs(counts[name] - num_samples * rate) < 3 * deviation, name


class Collects(Dataset):
    """Holds 200,000 buckets; an item is the private memory that a collection costs its process, in bytes."""

    def __init__(self) -> None:
        self.buckets = [Bucket(row, 48, 32) for row in range(200_000)]

    def __getitem__(self, index: int) -> int:
        before = psutil.Process().memory_full_info().uss
        gc.collect()
        return psutil.Process().memory_full_info().uss - before


def test_workers_share_the_rows_with_their_parent() -> None:
    dataset = Collects()
    copied, shared = (
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1, sampler=[0], worker_init_fn=function)))
        for function in (None, share_memory)
    )
    assert shared < 2**20 < 10 * 2**20 < copied  # of 15 MB
