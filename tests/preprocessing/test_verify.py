import json
import os

import numpy as np
import pytest
from clip_rows import SETTINGS, H, T, W, clip_row, png, write_dataset
from datasets import Features, Value

from preprocessing.cli import main
from preprocessing.part_checks import Problem
from preprocessing.process_map import Crash, map_in_processes
from preprocessing.verify import verify_clips
from preprocessing.video import encode_mp4
from wan_accel.data.schema import clips_features, pack_mask


def grey_video(num_frames=T, height=H, width=W) -> dict:
    return {"bytes": encode_mp4(np.full((num_frames, height, width, 3), 90, np.uint8), 10.0)[0], "path": None}


def torn(video: dict) -> dict:
    """A video in which a piece of a picture is lost."""
    data = bytearray(video["bytes"])
    start = data.find(b"mdat") + 800
    data[start : start + 100] = bytes(100)
    return {"bytes": bytes(data), "path": None}


def points(shape, **at) -> np.ndarray:
    """Zeros, but for `value` at frame 3."""
    values = np.zeros((T, *shape), np.float32)
    if at:
        values[(3, 0, 0) if len(shape) == 2 else (3, 0)] = at["value"]
        values[3, ..., -1] = at.get("score", values[3, ..., -1])
    return values


def noisy_video() -> dict:
    frames = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)
    return {"bytes": encode_mp4(frames, 10.0)[0], "path": None}


FACE_BOXES = np.tile(np.int32([0, 30, 20, 50]), (T, 1))
NAN, INF = float("nan"), float("inf")
BROKEN = [
    ("schema", {"schema": "wan-accel/clips@2"}, "schema is 'wan-accel/clips@2', expected 'wan-accel/clips@1'"),
    ("clip_id", {"clip_id": ""}, "clip_id is empty"),
    ("caption", {"caption": None}, "caption is null"),
    ("num_frames", {"num_frames": 8}, "num_frames 8 is not 4n \\+ 1"),
    ("height", {"height": 100}, "height 100 is not divisible by 16"),
    ("width", {"width": None}, "width None is not divisible by 16"),
    ("fps", {"fps": NAN}, "fps nan is no rate"),
    ("source", {"source": {"sha256": "1234"}}, "source sha256 is '1234', expected 64"),
    ("source", {"source": {"end_seconds": 0.0}}, "source ends at 0.0 s, before it starts at 0.0 s"),
    ("source", {"source": {"start_seconds": NAN}}, "source lasts from nan to 0.9 s"),
    ("timestamps", {"timestamps": [0.0] * 8}, "timestamps has 8 frames, its row says 9"),
    ("timestamps", {"timestamps": [0, 1, 2, 3, 4, 3.5, 6, 7, 8]}, "timestamps falls at frame 5, from 4 to 3.5 s"),
    ("timestamps", {"timestamps": [0.0] * 8 + [NAN]}, "timestamps frame 8 has no time"),
    ("video", {"video": None}, "video is missing"),
    ("video", {"video": {"bytes": b"no video", "path": None}}, "video cannot be decoded after 0 frames"),
    ("video", {"video": torn(noisy_video())}, "video is damaged at frame 0"),
    ("video", {"video": grey_video(8)}, "video decodes to 8 frames, its row says 9"),
    ("video", {"video": grey_video(width=80)}, "video decodes to 80x96, expected 64x96"),
    ("face_video", {"face_video": grey_video()}, "face_video decodes to 64x96, expected 512x512"),
    ("face_video", {"face_video": None}, "face_video there are face boxes beside it"),
    ("face_video", {"face_boxes": None}, "face_video there are no face boxes beside it"),
    ("mask", {"mask": b"damaged"}, "mask the mask is damaged"),
    ("mask", {"mask": pack_mask(np.zeros((8, H, W)))}, "mask the mask holds 49152 pixels, expected 55296"),
    ("boxes", {"boxes": points((5,))[:8]}, "boxes has 8 frames, its row says 9"),
    ("boxes", {"boxes": points((5,), value=NAN)}, "boxes frame 3 has values that are NaN or infinite"),
    ("keypoints", {"keypoints": points((133, 3))[:8]}, "keypoints has 8 frames, its row says 9"),
    ("keypoints", {"keypoints": points((133, 3), value=INF)}, "keypoints frame 3 has values that are NaN or inf"),
    ("keypoints", {"keypoints": points((133, 3), value=NAN, score=0.7)}, "keypoints frame 3 has values that are NaN"),
    ("keypoints_3d", {"keypoints_3d": points((133, 4))[:5]}, "keypoints_3d has 5 frames, its row says 9"),
    ("pose_keypoints", {"pose_keypoints": points((62, 3), value=INF)}, "pose_keypoints frame 3 has values that"),
    ("pose_keypoints", {"pose_keypoints": points((62, 3))[:1]}, "pose_keypoints has 1 frames, its row says 9"),
    ("pose_keypoints", {"pose_keypoints": None}, "pose_keypoints is missing"),
    ("face_boxes", {"face_boxes": FACE_BOXES[:4]}, "face_boxes has 4 frames, its row says 9"),
    ("face_boxes", {"face_boxes": FACE_BOXES + [50, 0, 50, 0]}, "face_boxes frame 0: x 50..70, y 30..50 holds no"),
    ("face_boxes", {"face_boxes": FACE_BOXES[:, [2, 1, 0, 3]]}, "face_boxes frame 0: x 20..0, y 30..50 holds no"),
    ("reference", {"reference": None}, "reference is missing in a clip of purpose train"),
    ("reference", {"reference": {"bytes": png((0, 0, 0), (H, W))[:60], "path": None}}, "reference cannot be decoded"),
    ("reference", {"reference": {"bytes": png((0, 0, 0), (32, 32)), "path": None}}, "reference is 32x32, its canvas"),
    ("canvas_height", {"canvas_height": 32}, "canvas_height the canvas is 64x32, the video 64x96"),
    ("reference_source", {"reference_source": {"kind": "dream"}}, "reference_source kind is 'dream', expected frame"),
    ("purpose", {"purpose": "watch"}, "purpose is 'watch', expected train or drive"),
    ("modes", {"modes": []}, "modes are \\[\\], expected one or both of animation, replacement"),
    ("modes", {"modes": ["dancing"]}, "modes are \\['dancing'\\]"),
    ("modes", {"modes": ["replacement"], "mask": None}, "modes has replacement, but the clip has no mask"),
    ("quality", {"quality": {"blur": INF}}, "quality blur is inf"),
    ("provenance", {"provenance": "{broken"}, "provenance is no JSON"),
    ("provenance", {"provenance": "[]"}, "provenance is list, expected an object"),
    ("settings_hash", {"settings_hash": "abc"}, "settings_hash is 'abc', the settings in provenance have '"),
    ("provenance", {"provenance": json.dumps({"settings": {**SETTINGS, "fps": 5}})}, "settings_hash is '"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "changes", "message"), BROKEN, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(BROKEN)])
def test_a_clip_that_is_wrong_in_one_place_is_named_with_it(tmp_path, column, changes, message):
    good = clip_row("good")
    changes = {name: {**good[name], **value} if isinstance(value, dict) and name != "video" else value
               for name, value in changes.items()}  # fmt: skip
    dataset = write_dataset(tmp_path / "clips", [good, {**clip_row("bad"), **changes}])
    verdict = verify_clips(dataset)
    assert (verdict.num_parts, verdict.num_clips, verdict.num_bad_clips) == (1, 2, 1)
    name = changes.get("clip_id", "bad")
    for problem in verdict.problems:
        assert (problem.part, problem.row, problem.clip_id) == ("parts/writer0/data-00000.arrow", 1, name)
    with pytest.raises(ValueError, match=f"^clip {name} \\(parts/writer0/data-00000.arrow, row 1\\): {message}"):
        raise ValueError(next(str(found) for found in verdict.problems if message.startswith(str(found.column))))


def test_what_is_allowed_to_be_absent_is_no_problem(tmp_path):
    row = clip_row("bare", keypoints=None, boxes=None, mask=None, face_boxes=None, face_video=None, provenance="{}")
    absent = clip_row("absent", keypoints=np.where([1, 1, 0], np.nan, points((133, 3))), timestamps=[0.5] * T)
    figures = clip_row("figures", quality=dict.fromkeys(row["quality"]))
    dataset = write_dataset(tmp_path / "clips", [row, absent, figures, clip_row("drive", canvas=(64, 96))])
    assert verify_clips(dataset).problems == []


def test_clips_without_people_have_fewer_columns(tmp_path):
    features = clips_features(animate=False)
    row = {name: value for name, value in clip_row("plain").items() if name in features}
    dataset = write_dataset(tmp_path / "clips", [row, {**row, "clip_id": "late", "timestamps": []}], features=features)
    (problem,) = verify_clips(dataset).problems
    assert str(problem).startswith("clip late (parts/writer0/data-00000.arrow, row 1): timestamps has 0 frames")


def test_a_clip_that_is_there_twice_is_named_with_both_places(tmp_path):
    dataset = write_dataset(tmp_path / "clips", [clip_row("a"), clip_row("b")], [clip_row("c"), clip_row("a")])
    (problem,) = verify_clips(dataset).problems
    assert str(problem) == (
        "clip a (parts/writer0/data-00001.arrow, row 1): clip_id is also in parts/writer0/data-00000.arrow, row 0"
    )


@pytest.fixture
def two_parts(tmp_path):
    """A sound part, and one whose last clip is wrong."""
    bad = clip_row("bad", purpose="watch")
    return write_dataset(tmp_path / "clips", [clip_row("a"), clip_row("b")], [clip_row("c"), bad])


def spoil(part, change) -> None:
    data = bytearray(part.read_bytes())
    change(data)
    part.write_bytes(data)


def flip_in_a_video(data: bytearray) -> None:
    data[data.find(b"mdat") + 100] ^= 1


def flip_everywhere(data: bytearray) -> None:
    data[:] = bytes(255 - byte for byte in data)


def cut(data: bytearray) -> None:
    del data[-5000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_in_a_video, "content differs from its hash: none of its clips can be trusted; copy it again"),
        (flip_everywhere, "cannot be read beyond row 0"),
        (cut, r"\d+ bytes, expected \d+: none of its clips"),
    ],
)
def test_damage_in_one_part_hides_none_in_another(two_parts, change, message):
    spoil(two_parts / "parts/writer0/data-00000.arrow", change)
    problems = verify_clips(two_parts).problems
    with pytest.raises(ValueError, match=f"parts/writer0/data-00000.arrow: {message}"):
        raise ValueError("\n".join(map(str, problems)))
    assert str(problems[-1]) == (
        "clip bad (parts/writer0/data-00001.arrow, row 1): purpose is 'watch', expected train or drive"
    )


def test_a_video_that_was_damaged_on_disk_is_named_beside_its_part(tmp_path):
    dataset = write_dataset(tmp_path / "clips", [clip_row("a"), clip_row("b", video=noisy_video())])
    part = dataset / "parts/writer0/data-00000.arrow"
    video = noisy_video()["bytes"]

    def change(data: bytearray) -> None:
        start = data.find(video) + video.find(b"mdat")
        data[start + 800 : start + 900] = bytes(100)

    spoil(part, change)
    whole, clip = verify_clips(dataset).problems
    assert "content differs from its hash" in whole.message and whole.clip_id is None
    assert (clip.clip_id, clip.row, clip.column) == ("b", 1, "video")


def test_offsets_that_point_elsewhere_end_no_check(two_parts):
    """Texts whose offsets were overwritten would be read from anywhere in memory."""
    part = two_parts / "parts/writer0/data-00000.arrow"
    offsets = np.array([0, 17, 34], np.int32).tobytes()  # of `schema`, twice 17 letters

    def change(data: bytearray) -> None:
        at = data.find(offsets)
        assert at > 0
        data[at : at + 12] = np.array([0, 1 << 30, 1 << 29], np.int32).tobytes()

    spoil(part, change)
    messages = [str(problem) for problem in verify_clips(two_parts).problems]
    assert any(message.startswith(f"parts/writer0/{part.name}: rows 0 to 1 cannot be read") for message in messages)
    assert messages[-1].startswith("clip bad ")


def test_missing_parts_and_sidecars_are_named(two_parts):
    first, second = (two_parts / f"parts/writer0/data-0000{i}.arrow" for i in range(2))
    first.unlink()
    sidecar = second.with_name(second.name + ".json")
    sidecar.write_text(sidecar.read_text()[:-9])
    problems = [str(problem) for problem in verify_clips(two_parts).problems]
    assert problems[0].startswith("parts/writer0/data-00000.arrow: missing")
    assert problems[1].startswith("parts/writer0/data-00001.arrow: its sidecar is damaged")
    assert problems[2].startswith("clip bad ")
    sidecar.unlink()
    assert "parts/writer0/data-00001.arrow: has no sidecar: copy it again" in map(str, verify_clips(two_parts).problems)


def test_rows_that_the_sidecar_does_not_know_are_noticed(two_parts):
    sidecar = two_parts / "parts/writer0/data-00000.arrow.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "rows": 3}))
    assert str(verify_clips(two_parts).problems[0]).startswith("parts/writer0/data-00000.arrow: 2 rows, expected 3")


def test_a_part_that_state_json_forgets_is_noticed(two_parts):
    state = json.loads((two_parts / "state.json").read_text())
    (two_parts / "state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"][:1]}))
    messages = list(map(str, verify_clips(two_parts).problems))
    assert "parts/writer0/data-00001.arrow: is not in state.json, so load_from_disk leaves it out" in messages
    (two_parts / "state.json").write_text("{")
    assert str(verify_clips(two_parts).problems[-1]).startswith("state.json: or wan_accel_run.json is damaged")


def test_columns_that_are_no_columns_of_clips_are_named(tmp_path):
    expected = clips_features()
    kinds = {name: kind for name, kind in expected.items() if name != "fps"}
    quality = {**expected["quality"], "beauty": Value("float32")}
    features = Features({**kinds, "caption": Value("int32"), "smell": Value("string"), "quality": quality})
    row = {name: value for name, value in clip_row("a", caption=3).items() if name in features}
    dataset = write_dataset(tmp_path / "clips", [row], features=features)
    found = [problem.message for problem in verify_clips(dataset).problems]
    assert found[:2] == ["has no column fps", "has a column smell, which this version does not know"]
    assert found[2].startswith("column caption is Value('int32'), expected Value('string')")
    features = Features({**expected, "quality": quality})
    dataset = write_dataset(tmp_path / "more", [clip_row("a")], features=features)
    (problem,) = verify_clips(dataset).problems
    assert problem.column == "quality" and "'beauty' is no figure of this version" in problem.message


def test_processes_find_the_same_and_write_it_for_machines(two_parts, tmp_path, capsys):
    expected = verify_clips(two_parts).problems
    assert verify_clips(two_parts, num_processes=2).problems == expected
    path = tmp_path / "verdict.json"
    assert main(["verify", str(two_parts), "--json", str(path), "--num-workers", "1"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")] == [
        f"error: {problem}" for problem in expected
    ]
    verdict = json.loads(path.read_text())
    problems = [Problem(**problem) for problem in verdict.pop("problems")]
    assert problems == expected
    assert verdict == {
        "dataset": str(two_parts), "sound": False, "num_bad_clips": 1, "num_parts": 2, "num_clips": 4,
    }  # fmt: skip


def end_at_three(task: int) -> int:
    if task == 3:
        os.abort()
    return task * task


def test_a_task_that_ends_its_process_is_the_only_one_lost():
    results = dict(map_in_processes(end_at_three, range(8), num_processes=2))
    assert results.pop(3) == Crash()
    assert results == {task: task * task for task in range(8) if task != 3}


CRASH = """
import os, av
really_open = av.open
def open_or_crash(file, *arguments, **options):
    if b"crashes the decoder" in file.getvalue():
        os.abort()
    return really_open(file, *arguments, **options)
av.open = open_or_crash
"""


def test_a_clip_that_crashes_the_decoder_is_named_and_the_rest_is_checked(two_parts, tmp_path, monkeypatch):
    """A decoder that crashes stands in for one with a fault that no video here has."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    deadly = clip_row("deadly", video={"bytes": grey_video()["bytes"] + b"crashes the decoder", "path": None})
    dataset = write_dataset(tmp_path / "more", [clip_row("a"), deadly, clip_row("b")], [clip_row("c", purpose="watch")])
    verdict = verify_clips(dataset, num_processes=2)
    assert verdict.num_clips == 4
    assert list(map(str, verdict.problems)) == [
        "clip deadly (parts/writer0/data-00000.arrow, row 1) ends the process that decodes it",
        "clip c (parts/writer0/data-00001.arrow, row 0): purpose is 'watch', expected train or drive",
    ]


def test_an_error_of_a_task_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(map_in_processes((1).__floordiv__, [1, 0], num_processes=2))
