"""What training draws from, out of a recipe: captions laid over, filters, mixtures, and what is refused at once."""

import contextlib
import io
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from ranks import run_ranks
from tiny_clips import clip_row, write_clips

from wan_accel import cache, sources, train
from wan_accel.data import store
from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.digest import digest_rows
from wan_accel.data.latents import LatentsDataset
from wan_accel.data.mixture import MixedLatents
from wan_accel.data.schema import LATENTS_SCHEMA, clips_features, latents_features, null_features
from wan_accel.draws import SampleDraw
from wan_accel.models.variants import get_variant
from wan_accel.parallel.agreement import name_ranks
from wan_accel.sources import open_source
from wan_accel.tiny import init_tiny

VARIANT = get_variant("t2v-1.3b")
QUALITY = [{"motion": 0.1}, {"motion": 0.5}, {}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and two latents folders: of three clips with quality figures, and of two others."""
    folder = tmp_path_factory.mktemp("sources")
    init_tiny("t2v-1.3b", folder / "model")
    rows = [clip_row(n, caption=f"clip {n}", quality=quality) for n, quality in enumerate(QUALITY)]
    write_clips(folder / "clips", rows)
    write_clips(folder / "others", [clip_row(n, num_frames=9) for n in (7, 8)])
    (folder / "recipe.yaml").write_text(
        f"variant: t2v-1.3b\nmodel: {{checkpoint: {folder}/model}}\nmethod: {{kind: lora, r: 4}}\n"
        f"training: {{output_dir: {folder}/run, max_steps: 3, dataloader_num_workers: 0, logging_steps: 1}}\n"
    )
    assert cache.main(arguments(folder)) == 0
    assert cache.main(arguments(folder, f"data.clips={folder}/others", f"data.latents={folder}/latents2")) == 0
    return folder


def arguments(root: Path, *overrides: str) -> list[str]:
    data = [f"data.clips={root}/clips", f"data.latents={root}/latents"]
    return [str(root / "recipe.yaml"), *data, *overrides]


def opened(root: Path, *overrides: str) -> LatentsDataset | MixedLatents:
    recipe, *rest = arguments(root, *overrides)
    return open_source(cache.load_recipe(recipe, rest), VARIANT)


def mixed(root: Path, weights: tuple[str, str] = ("1", "1")) -> list[str]:
    parts = ", ".join(f"{{path: {root}/{name}, weight: {w}}}" for name, w in zip(("latents", "latents2"), weights))
    return ["data.latents=null", f"data.datasets=[{parts}]"]


def draw(index: int) -> SampleDraw:
    return SampleDraw(index=index, epoch=0, sigma=0.5, noise_seed=1)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("quality.motion > 0.3", ["square1"]),
        ("quality.motion is missing", ["square2"]),
        ("caption = 'clip 0' or clip_id contains 2", ["square0", "square2"]),
        ("num_frames = 5 and height = 48 and fps > 15 and modes contains placement", [f"square{n}" for n in range(3)]),
    ],
)  # fmt: skip
def test_rows_are_chosen_in_training_and_caching(root: Path, tmp_path: Path, where: str, expected: list[str]) -> None:
    assert opened(root, f"data.where={where}").clip_ids == expected
    overrides = f"data.where={where}", f"data.latents={tmp_path / 'some'}"
    assert cache.main(arguments(root, *overrides)) == 0
    assert sorted(LatentsDataset(tmp_path / "some").clip_ids) == expected


def test_sample_of_a_chosen_row_is_its_own(root: Path) -> None:
    whole, chosen = opened(root), opened(root, "data.where=quality.motion > 0.3")
    assert isinstance(whole, LatentsDataset)
    row = whole.clip_ids.index("square1")
    for name, tensor in whole.sample(row, draw(row)).items():
        assert torch.equal(tensor, chosen.sample(0, draw(0))[name])
    assert chosen.index().buckets == (whole.index().buckets[row],) and len(chosen.group_ids) == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("quality.motoin > 1", r"data\.where: a clip has no quality\.motoin: did you mean quality\.motion\?"),
        ("num_frames > 5", "data.where='num_frames > 5' holds for no (row|clip) of"),
        ("num_frames >", "data.where 'num_frames >' ends too early"),
    ],
)
def test_filter_that_makes_no_sense(
    root: Path, where: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(root, f"data.where={where}")
    assert cache.main(arguments(root, f"data.where={where}")) == 2
    error = capsys.readouterr().err
    assert "data.where" in error and len(error.splitlines()) == 1


def test_captions_are_laid_over_without_rewriting(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "latents", tmp_path / "latents")
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"clip_id": "square1", "caption": "another one"}) + "\n")
    laid = f"data.captions={file}", f"data.latents={tmp_path / 'latents'}"
    with pytest.raises(LatentsError, match=r"has no text for 1 clips: .* again, with the same data\.captions"):
        opened(root, *laid)
    clips = store.parts(tmp_path / "latents" / "clips")
    before = opened(root, laid[1])
    # A caption overlay is no change of the clips: only the new text is encoded.
    assert cache.main(arguments(root, *laid)) == 0
    texts = {row["caption"]: cell_to_tensor(row["embeddings"]) for row in
             store.load(tmp_path / "latents" / "text", LATENTS_SCHEMA)}  # fmt: skip
    source = opened(root, *laid)
    assert isinstance(source, LatentsDataset) and isinstance(before, LatentsDataset)
    for row, name in enumerate(source.clip_ids):
        caption = "another one" if name == "square1" else f"clip {name[-1]}"
        assert torch.equal(source.sample(row, draw(row))["text"], texts[caption])
    assert store.parts(tmp_path / "latents" / "clips") == clips
    assert opened(root, *laid, "data.where=caption contains another").clip_ids == ["square1"]
    assert source.clip_info(source.clip_ids.index("square1")).caption == "another one"
    assert torch.equal(opened(root, laid[1]).sample(1, draw(1))["text"], before.sample(1, draw(1))["text"])


def test_clips_that_are_gone_are_named_at_the_start(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_clips(tmp_path / "clips", [clip_row(0)])

    def build(*overrides: str) -> train.WanTrainer:
        recipe, *rest = arguments(root, f"data.clips={tmp_path}/clips", *overrides)
        return train.build_trainer(train.load_recipe(recipe, rest))

    assert len(build().source) == 3
    (said,) = [record.message for record in caplog.records if "no longer" in record.message]
    assert f"data.latents={root}/latents has 2 clips that are no longer in data.clips={tmp_path}/clips and are" in said
    assert "trained on (square1, square2): to leave them out, encode into a new folder" in said
    caplog.clear()
    assert len(build("data.where=" + said.split("e.g. to ")[1]).source) == 1  # as it says
    build("data.clips=nowhere")
    assert "are trained on" not in caplog.text
    next((tmp_path / "clips" / "parts").rglob("*.arrow")).unlink()  # training needs the latents only
    assert len(build().source) == 3 and "cannot be compared with the latents: " in caplog.text


def test_captions_of_unknown_clips_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"square1": "clip 1", "sqare2": "y"}))
    opened(root, f"data.captions={file}")
    assert "has captions of 1 clips that the dataset does not have (sqare2): are" in caplog.text
    file.write_text(json.dumps({"sqare2": "y"}))
    with pytest.raises(ValueError, match=r"captions of 1 clips that the dataset does not have \(sqare2\), and none"):
        opened(root, f"data.captions={file}")
    assert cache.main(arguments(root, f"data.captions={file}")) == 2
    assert "(sqare2)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"none\.csv does not exist"):
        opened(root, "data.captions=none.csv")


def test_mixture_draws_from_both_folders(root: Path) -> None:
    source = opened(root, *mixed(root))
    one, two = opened(root), opened(root, f"data.latents={root}/latents2")
    assert isinstance(source, MixedLatents) and len(source) == 5
    assert source.clip_ids == [*one.clip_ids, *two.clip_ids] and source.keys == one.keys
    assert source.index().buckets == (*one.index().buckets, *two.index().buckets)
    for row, (part, own) in enumerate([(one, 0), (one, 1), (one, 2), (two, 0), (two, 1)]):
        for name, tensor in source.sample(row, draw(row)).items():
            assert torch.equal(tensor, part.sample(own, draw(own))[name])
    assert [source.clip_info(row).clip_id for row in range(5)] == source.clip_ids
    folders = ["latents"] * 3 + ["latents2"] * 2
    assert [source.clip_info(row).folder for row in range(5)] == folders and one.clip_info(0).folder == ""
    assert torch.equal(*(one.unconditional({"text": torch.zeros(2, 1, 1)})["text"] for one in (source, two)))
    assert source.mixture(range(5), seed=0).counts == [3, 2]  # 2.5 each
    assert opened(root, *mixed(root, ("3", "1"))).mixture(range(5), seed=0).counts == [4, 1]


def test_mixture_trains(root: Path) -> None:
    recipe, *rest = arguments(root, *mixed(root, ("1", "4")), f"training.output_dir={root}/mixed")
    trainer = train.build_trainer(train.load_recipe(recipe, rest))
    draws = [d for step in range(10) for m in trainer.plan.step(step, 1).micro_steps for d in m.samples[0]]
    assert sum(d.index >= 3 for d in draws) == 8
    trainer.train()
    assert trainer.state.global_step == 3


def test_folders_that_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    state = torch.load(root / "model" / VARIANT.vae.file, weights_only=True)
    shutil.copytree(root / "model", tmp_path / "model")
    torch.save({name: tensor * 1.25 for name, tensor in state.items()}, tmp_path / "model" / VARIANT.vae.file)
    shutil.copytree(root / "latents2", tmp_path / "latents2")
    other = [f"data.clips={root}/others", f"data.latents={tmp_path}/latents2", f"model.checkpoint={tmp_path}/model"]
    assert cache.main(arguments(root, *other)) == 0
    folders = [f"data.datasets=[{{path: {root}/latents}}, {{path: {tmp_path}/latents2}}]", "data.latents=null"]
    with pytest.raises(LatentsError, match=f"{tmp_path}/latents2: video was encoded with other weights"):
        opened(root, *folders)
    one, two = LatentsDataset(root / "latents"), LatentsDataset(tmp_path / "latents2")
    with pytest.raises(LatentsError, match=r"latents2 and .*latents differ in video: run wan_accel.cache on both"):
        MixedLatents([one, two]).check_same_keys()


def without_nulls(root: Path, tmp_path: Path, kept: str) -> Path:
    for part in ("clips", "text"):
        (tmp_path / "latents" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "latents" / part).symlink_to(root / "latents" / part)
    with store.PartWriter(tmp_path / "latents" / "null", writer="rank0", features=null_features()) as writer:
        for row in store.load(root / "latents" / "null", LATENTS_SCHEMA):
            if row["kind"] == kept:
                writer.write(row)
    return tmp_path / "latents"


def test_dropout_without_its_null_row_is_refused_at_the_start(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_nulls(root, tmp_path, "negative_prompt")
    run = [f"data.latents={folder}", f"training.output_dir={tmp_path / 'run'}"]
    assert train.main(arguments(root, *run, "data.caption_dropout=0.1")) == 2
    error = capsys.readouterr().err.strip()
    assert "null has no empty_prompt (data.caption_dropout=0.1): run wan_accel.cache on it again, or set" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()
    LatentsDataset(folder).check_nulls(caption_dropout=0, face_dropout=0)
    with pytest.raises(LatentsError, match=r"no face \(data\.face_dropout=0\.2\)"):
        LatentsDataset(folder).check_nulls(caption_dropout=0, face_dropout=0.2)


def test_latents_that_contradict_their_bucket(root: Path, tmp_path: Path) -> None:
    for part in ("text", "null"):
        (tmp_path / part).symlink_to(root / "latents" / part)
    with store.PartWriter(tmp_path / "clips", writer="rank0", features=latents_features()) as writer:
        for row in store.load(root / "latents" / "clips", LATENTS_SCHEMA):
            writer.write(row | {"num_frames": 9})
    source = LatentsDataset(tmp_path, variant=VARIANT)
    with pytest.raises(
        LatentsError,
        match=r"clip square1 \(row 1\): latents \(16, 2, 6, 4\) where the bucket of 9 frames of 48x32 needs \(16, 3,",
    ):
        source.sample(source.clip_ids.index("square1"), draw(1))


def add_clips(folder: Path, numbers: range, *, writer: str) -> None:
    """Parts of a clip each, as a run of the cache that goes on would write them."""
    first = next(iter(store.load(folder, LATENTS_SCHEMA)))
    with store.PartWriter(folder, writer=writer, features=latents_features()) as parts:
        for number in numbers:
            parts.write(first | {"clip_id": f"{writer}-{number}"})
            parts.flush()


def open_folders(root: str, *folders: str) -> list[list[str] | str]:
    """The clips of each folder, or why they cannot be used; each rank is in a folder of its own."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    os.chdir(Path(root) / os.environ["RANK"])
    seen: list[list[str] | str] = []
    for folder in folders:
        try:
            seen.append(opened(Path(root), f"data.latents={folder}").clip_ids)
        except ValueError as error:
            seen.append(str(error))
    return seen


def test_ranks_have_the_rows_of_the_main_rank_or_stop(root: Path, tmp_path: Path) -> None:
    """A copy each: one that grew since the main rank listed it, one with other clips in the same parts, none."""
    shutil.copyfile(root / "recipe.yaml", tmp_path / "recipe.yaml")
    for rank in ("0", "1"):
        for name in ("grown", "other"):
            shutil.copytree(root / "latents", tmp_path / rank / name)
    add_clips(tmp_path / "1" / "grown" / "clips", range(3), writer="a")  # before the others in order
    shutil.rmtree(tmp_path / "1" / "other" / "clips" / "parts")
    with store.PartWriter(tmp_path / "1" / "other" / "clips", writer="rank0", features=latents_features()) as writer:
        for row in store.load(root / "latents" / "clips", LATENTS_SCHEMA):
            writer.write(row | {"clip_id": "other " + row["clip_id"]})
    first, second = run_ranks(open_folders, 2, str(tmp_path), "grown", "other", "none")
    assert first == second
    grown, other, none = first
    assert grown == opened(root).clip_ids
    assert other == (
        "other does not have the same rows on all ranks (3 on rank 0; 3 on rank 1; equal numbers may be other clips or "
        "captions): give every machine the same folder, or equal copies, and start again"
    )
    assert "none/clips is not a dataset of wan-accel (no state.json)" in none
    assert (name_ranks([3]), name_ranks([0, 1, 2, 5, 7, 8])) == ("rank 3", "ranks 0-2, 5, 7-8")


def open_while_growing(root: str, folder: str) -> list[list[str] | str]:
    """Rank 0 writes clips while both open the folder, rank 1 always later."""
    growing = threading.Thread(target=add_clips, args=(Path(folder) / "clips", range(30)), kwargs={"writer": "a"})
    if os.environ["RANK"] == "0":
        growing.start()
    else:
        sources.LatentsDataset = later  # type: ignore[assignment, misc]
    seen = open_folders(root, *[folder] * 5)
    if growing.is_alive():
        growing.join()
    return [*seen, opened(Path(root), f"data.latents={folder}").clip_ids]


def later(*arguments: Any, **options: Any) -> LatentsDataset:
    time.sleep(0.3)
    return LatentsDataset(*arguments, **options)


def test_ranks_agree_on_a_folder_that_grows(root: Path, tmp_path: Path) -> None:
    shutil.copyfile(root / "recipe.yaml", tmp_path / "recipe.yaml")
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    shutil.copytree(root / "latents", tmp_path / "latents")
    first, second = run_ranks(open_while_growing, 2, str(tmp_path), str(tmp_path / "latents"))
    assert first == second
    assert all(isinstance(names, list) for names in first), first
    counts = [len(names) for names in first]
    assert counts == sorted(counts) and counts[-1] == 33 and len(set(counts)) > 1


def cache_copies(root: str, *folders: str) -> list[tuple[int, str]]:
    os.chdir(Path(root) / os.environ["RANK"])
    outcomes = []
    for folder in folders:
        with contextlib.redirect_stderr(io.StringIO()) as error:
            overrides = f"data.clips={folder}", f"data.latents={root}/latents-{folder}"
            outcomes.append((cache.main([f"{root}/recipe.yaml", *overrides]), error.getvalue()))
    return outcomes


def test_ranks_cache_the_clips_of_the_main_rank_or_stop(root: Path, tmp_path: Path) -> None:
    """Rank 1 sees a clip that was written later, and in another folder other captions."""
    shutil.copyfile(root / "recipe.yaml", tmp_path / "recipe.yaml")
    for rank in range(2):
        folder = tmp_path / str(rank)
        write_clips(folder / "grown", [clip_row(n) for n in range(4)])
        write_clips(folder / "other", [clip_row(n, caption=f"of rank {rank}") for n in range(2)])
    with store.PartWriter(tmp_path / "1" / "grown", writer="a", features=clips_features()) as writer:
        writer.write(clip_row(9, caption="later"))
    first, second = run_ranks(cache_copies, 2, str(tmp_path), "grown", "other")
    assert first[0][0] == second[0][0] == 0 and first[1] == second[1]
    assert first[1][0] == 2 and "data.clips=other does not have the same rows on all ranks (2 on rank 0;" in first[1][1]
    assert sorted(LatentsDataset(tmp_path / "latents-grown").clip_ids) == [f"square{n}" for n in range(4)]
    texts = store.load(tmp_path / "latents-grown" / "text", LATENTS_SCHEMA)["caption"]
    assert len(texts) == len(set(texts)) == 4 and "later" not in texts
    assert not (tmp_path / "latents-other").exists()


def test_digest_tells_order_texts_and_weights(root: Path) -> None:
    digest = opened(root).digest
    assert digest.rows == 3 and digest == opened(root).digest
    assert opened(root, "data.where=quality.motion is missing").digest.rows == 1
    table = pa.table({"clip_id": ["a", "b", "c"], "caption_id": ["x", None, "z"], "num_frames": [5, 9, None]})
    digests = {
        digest_rows(other).xxh128
        for other in (
            table, table.take([1, 0, 2]), table.slice(0, 2),
            table.set_column(0, "clip_id", [["ab", "", "c"]]), table.set_column(1, "caption_id", [["x", "", "z"]]),
            table.set_column(2, "num_frames", [[5, 9, 0]]),
        )
    }  # fmt: skip
    assert len(digests) == 6
    assert digest_rows(pa.concat_tables([table.slice(0, 1), table.slice(1)])) == digest_rows(table)
    weighted = [opened(root, *mixed(root, weights)).digest for weights in (("1", "1"), ("1", "2"))]
    assert weighted[0] != weighted[1] and weighted[0].rows == 5


def test_resume_on_other_data_says_so_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "latents", tmp_path / "latents")
    folders = f"data.latents={tmp_path}/latents", f"training.output_dir={tmp_path}/run"
    assert train.main(arguments(root, *folders)) == 0
    add_clips(tmp_path / "latents" / "clips", range(2), writer="a")
    for rows_grew in (True, False):  # the second time the checkpoint is of the data that there is
        caplog.clear()
        steps = 4 + (not rows_grew)
        assert train.main(arguments(root, *folders, f"training.max_steps={steps}")) == 0
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        changed = [line for line in warnings if "the data changed since" in line]
        assert len(changed) == rows_grew
        if rows_grew:
            assert "checkpoint-3 was written (3 rows then, 5 now" in changed[0]
