import json
import time
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from preprocessing.inputs import InputError, Source, caption_of, find_sources, local_file


@pytest.fixture
def folder(tmp_path) -> Path:
    """Videos (empty files will do) at several depths, and other files."""
    for name in ("b.mp4", "a.MOV", "deep/er/c.webm", "notes.txt", "deep/picture.png"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "videos"


def names(sources) -> list[str]:
    return [Path(source.path).name for source in sources]


def test_folders_are_searched_to_the_bottom_and_files_count_once(folder, monkeypatch):
    assert names(find_sources([str(folder)])) == ["a.MOV", "b.mp4", "c.webm"]
    monkeypatch.chdir(folder)
    assert names(find_sources(["b.mp4", str(folder), "b.mp4"])) == ["b.mp4", "a.MOV", "c.webm"]


def test_what_is_not_there_is_said(folder):
    with pytest.raises(InputError, match=r"missing\.mp4: no such file or folder"):
        find_sources([str(folder), "missing.mp4"])
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no videos \(\.mp4, "):
        find_sources([str(folder.parent / "empty")])


ROWS = [
    {"path": "b.mp4", "caption": "she walks", "start_seconds": 1.5, "end_seconds": 4.0},
    {"path": "b.mp4", "caption": "she stops", "start_seconds": 4.0},
    {"path": "deep/er/c.webm", "reference": "deep/picture.png"},
]


def write_manifest(path: Path, rows=ROWS) -> str:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_manifest_says_what_it_says_and_no_more(folder, ending):
    sources = find_sources([write_manifest(folder / f"list{ending}")])
    place = str(folder)
    assert sources == [
        Source(path=f"{place}/b.mp4", caption="she walks", start_seconds=1.5, end_seconds=4.0),
        Source(path=f"{place}/b.mp4", caption="she stops", start_seconds=4.0),
        Source(path=f"{place}/deep/er/c.webm", reference=f"{place}/deep/picture.png"),
    ]
    assert len({source.key for source in sources}) == 3
    assert sources[0].key == f"{(folder / 'b.mp4').resolve()}#t=1.5,4"


def test_all_problems_of_a_manifest_come_at_once(folder):
    rows = [
        {"path": "b.mp4", "start_seconds": 5, "end_seconds": 4},
        {"path": "", "start_seconds": 1},
        {"path": "b.mp4", "start_seconds": "soon"},
        {"path": "a.MOV", "colour": "red"},
        {"path": "a.MOV"},
        *[{"path": "x.mp4", "start_seconds": -1 - i} for i in range(9)],
    ]
    with pytest.raises(InputError) as caught:
        find_sources([write_manifest(folder / "bad.jsonl", rows)])
    text = str(caught.value)
    for part in (
        "unknown columns colour: use path, caption", "row 1: end_seconds 4 is not after start_seconds 5",
        "row 2: no path",
        "row 3: start_seconds 'soon' is not a number of seconds", "row 5: ", "is there twice", "; and 4 more",
    ):  # fmt: skip
        assert part in text


def test_a_manifest_that_cannot_be_read_is_named(folder):
    (folder / "torn.jsonl").write_text('{"path": ')
    with pytest.raises(InputError, match=r"torn\.jsonl: the manifest cannot be read"):
        find_sources([str(folder / "torn.jsonl")])
    with pytest.raises(InputError, match=r"the manifest cannot be read .*No such file"):
        find_sources([str(folder / "missing.csv")])
    (folder / "nothing.csv").write_text("path\n")
    with pytest.raises(InputError, match="has no rows"):
        find_sources([str(folder / "nothing.csv")])


def test_large_manifests_load_in_seconds(tmp_path):
    path = tmp_path / "many.csv"
    path.write_text("path,caption\n" + "".join(f"videos/{i}.mp4,a caption\n" for i in range(200_000)))
    start = time.monotonic()
    assert len(find_sources([str(path)])) == 200_000
    assert time.monotonic() - start < 30


def test_captions_lie_beside_videos(folder):
    (folder / "b.txt").write_text("\ufeffshe walks\n", encoding="utf-8")
    plain, told = Source(path=str(folder / "b.mp4")), Source(path=str(folder / "b.mp4"), caption="told")
    assert (caption_of(plain), caption_of(told)) == ("she walks", "told")
    assert caption_of(Source(path=str(folder / "a.MOV"))) is None
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt: the caption is not UTF-8"):
        caption_of(Source(path=str(folder / "a.MOV")))


@pytest.fixture
def bucket():
    """Videos and a manifest behind URLs."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/b.mp4": b"bbb", "/bucket/deep/a.mp4": b"aa", "/bucket/notes.txt": b"n"})
    memory.pipe("/bucket/list.jsonl", b'{"path": "deep/a.mp4", "caption": "far"}\n')
    yield memory
    memory.rm("/bucket", recursive=True)


def test_remote_folders_and_manifests(bucket):
    assert [s.path for s in find_sources(["memory://bucket"])] == [
        "memory:///bucket/b.mp4",
        "memory:///bucket/deep/a.mp4",
    ]
    (source,) = find_sources(["memory://bucket/list.jsonl"])
    assert source == Source(path="memory://bucket/deep/a.mp4", caption="far")
    assert source.key == "memory://bucket/deep/a.mp4"


def test_a_remote_video_is_copied_and_the_copy_removed(bucket, tmp_path):
    with local_file("memory://bucket/deep/a.mp4", tmp_path) as path:
        assert (path.name, path.read_bytes()) == ("a.mp4", b"aa")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), local_file("memory://bucket/b.mp4", tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(FileNotFoundError, match=r"memory://bucket/gone\.mp4: no such file"),
        local_file("memory://bucket/gone.mp4", tmp_path),
    ):
        pass


def test_a_local_video_is_used_in_place(folder, tmp_path):
    with local_file(str(folder / "b.mp4"), tmp_path) as path:
        assert path == folder / "b.mp4"
    assert path.exists()


def test_a_copy_that_fails_is_tried_again(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.inputs._PAUSE_SECONDS", 0.0)
    calls = []
    original = type(bucket).get_file

    def flaky(self, place, target, **options):
        calls.append(place)
        if len(calls) < 3:
            raise OSError("connection reset")
        return original(self, place, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", flaky)
    with local_file("memory://bucket/b.mp4", tmp_path) as path:
        assert path.read_bytes() == b"bbb"
    monkeypatch.setattr(type(bucket), "get_file", lambda self, place, target, **options: Path(target).write_bytes(b"b"))
    with (
        pytest.raises(OSError, match=r"b\.mp4: cannot be copied, tried 3 times \(1 of 3 bytes arrived\)"),
        local_file("memory://bucket/b.mp4", tmp_path),
    ):
        pass


def test_an_unknown_protocol_names_what_is_missing():
    with (
        pytest.raises(InputError, match=r"nowhere://bucket/x\.mp4: .*install the fsspec package for it"),
        local_file("nowhere://bucket/x.mp4", Path()),
    ):
        pass
