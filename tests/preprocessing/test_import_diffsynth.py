"""DiffSynth's metadata becomes a manifest, and the manifest a dataset."""

import csv
import json
import shutil

import pytest
from diffsynth.core.data import UnifiedDataset
from small_runs import DEMO, NETWORK_OPTIONS, SMALL_OPTIONS, part_of

from preprocessing.cli import main
from preprocessing.import_diffsynth import REFERENCES, import_diffsynth
from preprocessing.inputs import InputError, read_manifest
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiffSynth dataset: two real videos and a picture of the character, below a base folder."""
    root = tmp_path_factory.mktemp("diffsynth")
    (root / "train").mkdir()
    for name in ("walker.mp4", "jumping.mp4"):
        part_of(name, root / "train" / name, range(30))
    shutil.copy(DEMO / "reference/man.png", root / "man.png")
    return root


ROWS = [
    {"video": "train/walker.mp4", "prompt": 'a woman walks, "fast"', "reference_image": "man.png", "fps": "30"},
    {"video": "train/jumping.mp4", "prompt": "", "reference_image": "", "fps": "30"},
]


def write(path, rows):
    """The three forms that DiffSynth reads."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("output", ["manifest.csv", "manifest.jsonl"])
@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_all_forms_give_the_same_manifest(folder, tmp_path, form, output):
    metadata = write(folder / f"metadata.{form}", ROWS)
    assert len(UnifiedDataset(str(folder), str(metadata)).data) == 2  # DiffSynth reads it, too
    imported = import_diffsynth(metadata, tmp_path / output)
    assert (imported.videos, list(imported.unused)) == (2, ["fps"])
    first, second = read_manifest(str(tmp_path / output))
    assert (first.path, second.path) == (str(folder / "train/walker.mp4"), str(folder / "train/jumping.mp4"))
    assert (first.caption, second.caption) == ('a woman walks, "fast"', None)
    assert (first.reference, second.reference) == (str(folder / "man.png"), None)


def test_the_base_path_is_where_relative_paths_start(folder, tmp_path, capsys):
    metadata = write(tmp_path / "metadata.csv", ROWS[1:])
    manifest = tmp_path / "manifest.csv"
    command = ["import", "--from=diffsynth", str(metadata), f"--output={manifest}"]
    assert main(command) == 2
    assert f"row 1: video {tmp_path / 'train/jumping.mp4'}: no such file" in capsys.readouterr().err
    assert main([*command, f"--base-path={folder}"]) == 0
    assert capsys.readouterr().out == f"{manifest}: 1 videos; columns that it does not use: fps\n"


def test_the_references_are_arguments_of_diffsynths_pipeline():
    import inspect

    from diffsynth.pipelines.wan_video import WanVideoPipeline

    assert set(REFERENCES) <= set(inspect.signature(WanVideoPipeline.__call__).parameters)


def test_clips_run_from_the_manifest(folder, tmp_path):
    import_diffsynth(write(folder / "metadata.json", ROWS), tmp_path / "manifest.jsonl")
    assert main(["clips", str(tmp_path / "manifest.jsonl"), f"--output={tmp_path / 'clips'}", *SMALL_OPTIONS]) == 0
    clips = store.load(tmp_path / "clips", CLIPS_SCHEMA)
    captions = {source["path"]: caption for source, caption in zip(clips["source"], clips["caption"])}
    assert captions == {str(folder / "train/walker.mp4"): ROWS[0]["prompt"], str(folder / "train/jumping.mp4"): ""}
    assert main(["verify", str(tmp_path / "clips")]) == 0


def test_animate_runs_from_the_manifest_with_its_references(folder, tmp_path):
    import_diffsynth(write(folder / "metadata.jsonl", ROWS[:1]), tmp_path / "manifest.csv")
    drive = ["--purpose=drive", "--reference=column", "--max-clips=1", f"--output={tmp_path / 'clips'}"]
    assert main(["animate", str(tmp_path / "manifest.csv"), *drive, *NETWORK_OPTIONS, *SMALL_OPTIONS]) == 0
    (row,) = store.load(tmp_path / "clips", CLIPS_SCHEMA)
    assert (row["caption"], row["purpose"], row["reference_source"]["kind"]) == (ROWS[0]["prompt"], "drive", "image")
    assert main(["verify", str(tmp_path / "clips")]) == 0


def test_all_problems_come_at_once_and_nothing_is_written(folder, tmp_path):
    picture, film = str(folder / "man.png"), str(folder / "train/walker.mp4")
    rows = [
        {"video": film, "prompt": "good"},
        {"video": "", "prompt": "no video"},
        {"video": picture, "prompt": "a picture"},
        {"video": "gone.mp4", "prompt": 7},
        {"video": film, "reference_image": "gone.png"},
        {"video": str(folder / "train/jumping.mp4"), "reference_image": picture, "vace_reference_image": [film, film]},
        {"prompt": "neither"},
    ]
    with pytest.raises(InputError) as caught:
        import_diffsynth(write(tmp_path / "metadata.json", rows), tmp_path / "manifest.csv")
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"{tmp_path / 'metadata.json'}: 8 problems"
    assert [int(line.split(":")[0].removeprefix("row ")) for line in lines] == [2, 3, 4, 4, 5, 5, 6, 7]
    for line, part in zip(lines, (
        "video is '', expected a path", "man.png is no video file", "gone.mp4: no such file", "prompt is 7, expected a",
        "reference_image /", "is in row 1 already; a manifest has a video once", "expected the path of one picture",
        "video is None",
    )):  # fmt: skip
        assert part in line, (line, part)
    assert not (tmp_path / "manifest.csv").exists()


def test_many_problems_are_counted(tmp_path):
    rows = [{"video": f"{number}.mp4"} for number in range(30)]
    with pytest.raises(InputError, match=r"30 problems(\n.*)+row 20: .*\n  and 10 more$"):
        import_diffsynth(write(tmp_path / "metadata.csv", rows), tmp_path / "manifest.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.json", '{"video": "a.mp4"}', "expected a list of rows"),
        ("metadata.json", '[{"video": ', "cannot be read"),
        ("metadata.jsonl", '{"video": "a.mp4"}\n3\n', "expected a list of rows"),
        ("metadata.csv", "file_name,text\na.mp4,b\n", "has no column 'video' but columns file_name, text"),
        ("metadata.csv", "", "has no column 'video' but nothing"),
        ("metadata.csv", "video,prompt\nhttp://x/a.mp4,one,two\n", "row 1: it has more cells than there are columns"),
    ],
)
def test_what_is_no_metadata_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        import_diffsynth(tmp_path / name, tmp_path / "manifest.csv")


def test_nothing_is_overwritten(folder, tmp_path):
    metadata = write(folder / "metadata.csv", ROWS)
    (tmp_path / "mine.csv").write_text("path\n")
    with pytest.raises(InputError, match=r"mine\.csv exists: remove it"):
        import_diffsynth(metadata, tmp_path / "mine.csv")
    with pytest.raises(InputError, match=r"manifest\.txt: a manifest ends in \.csv or \.jsonl"):
        import_diffsynth(metadata, tmp_path / "manifest.txt")
    with pytest.raises(InputError, match=r"gone\.csv cannot be read"):
        import_diffsynth(tmp_path / "gone.csv", tmp_path / "manifest.csv")
