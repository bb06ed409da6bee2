import json
import shutil

import pytest
from datasets import load_from_disk
from small_runs import part_of, rows_of, run_job

from preprocessing.cli import main
from preprocessing.merge import merge
from preprocessing.status import read_status, sentence
from wan_accel.data import store


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two datasets of clips without people, one of them with a rejected video."""
    root = tmp_path_factory.mktemp("halves")
    for name, start in (("one", 0), ("two", 40)):
        (root / f"videos-{name}").mkdir()
        part_of("walker.mp4", root / f"videos-{name}/walk.mp4", range(start, start + 32))
    (root / "videos-two/broken.mp4").write_bytes(b"nothing")
    for name in ("one", "two"):
        run_job(sorted((root / f"videos-{name}").iterdir()), root / name, kind="clips")
    return [root / "one", root / "two"]


def test_merged_datasets_hold_all_rows_by_links(halves, tmp_path):
    assert merge(halves, tmp_path / "all") == 4
    assert rows_of(tmp_path / "all") == {**rows_of(halves[0]), **rows_of(halves[1])}
    assert len(load_from_disk(str(tmp_path / "all"))) == 4
    assert store.verify(tmp_path / "all") == []
    originals = {part.stat().st_ino for half in halves for part in half.glob("parts/*/*.arrow")}
    assert {part.stat().st_ino for part in (tmp_path / "all").glob("parts/*/*.arrow")} == originals
    assert merge(halves, tmp_path / "all") == 4  # again: nothing more
    assert read_status(tmp_path / "all").reasons == {"unreadable": 1}


def test_a_copy_can_be_moved_and_outlives_the_originals(halves, tmp_path):
    for half in halves:
        shutil.copytree(half, tmp_path / half.name)
    copies = [tmp_path / half.name for half in halves]
    merge(copies, tmp_path / "all", copy=True)
    for copy in copies:
        shutil.rmtree(copy)
    (tmp_path / "all").rename(tmp_path / "moved")
    assert len(rows_of(tmp_path / "moved")) == 4


def test_the_same_clip_twice_is_refused(halves, tmp_path):
    shutil.copytree(halves[0], tmp_path / "copy")
    with pytest.raises(
        store.StoreError, match=r"clip walk-\S+ is in .*one and .*copy: merge datasets of different clips"
    ):
        merge([halves[0], tmp_path / "copy"], tmp_path / "all")
    with pytest.raises(store.StoreError, match="given twice"):
        merge([halves[0], halves[0]], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_an_unfinished_run_is_refused(halves, tmp_path):
    shutil.copytree(halves[0], tmp_path / "unfinished")
    (tmp_path / "unfinished/work/videos.json").write_text(json.dumps({"num_videos": 7}))
    with pytest.raises(
        store.StoreError, match=r"unfinished lacks 6 of its 7 videos: finish the runs, or .*--incomplete"
    ):
        merge([tmp_path / "unfinished", halves[1]], tmp_path / "all")
    assert merge([tmp_path / "unfinished", halves[1]], tmp_path / "all", incomplete=True) == 4


def test_datasets_of_two_kinds_are_refused(halves, tmp_path):
    run_job([halves[0].parent / "videos-one/walk.mp4"], tmp_path / "people")
    with pytest.raises(
        store.StoreError, match=r"has other columns than .*one \(boxes, canvas_height.*merge clips of one"
    ):
        merge([halves[0], tmp_path / "people"], tmp_path / "all")


def test_a_damaged_part_is_refused(halves, tmp_path):
    shutil.copytree(halves[0], tmp_path / "damaged")
    (part,) = (tmp_path / "damaged").glob("parts/*/*.arrow")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(store.StoreError, match="is damaged"):
        merge([tmp_path / "damaged", halves[1]], tmp_path / "all")


def test_the_commands_say_what_they_did(halves, tmp_path, capsys):
    assert main(["merge", *map(str, halves), "--output", str(tmp_path / "all")]) == 0
    assert "all: 4 clips of 2 datasets" in capsys.readouterr().out
    assert main(["status", str(halves[1])]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 videos done (100.0%): 1 finished, 1 rejected; 2 clips; 0 jobs at work" in out
    assert "rejected, unreadable: 1" in out


def test_status_tells_the_rate_and_the_time_left(halves):
    status = read_status(halves[1])
    assert status.videos_per_hour > 10 and status.hours_left == 0
    assert sentence(status).splitlines()[-1].endswith("0 h 00 min left at that rate")
    with pytest.raises(store.StoreError, match="is no dataset of wan-preprocess"):
        read_status(halves[0].parent)
