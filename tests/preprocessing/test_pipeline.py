import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.batch import run
from preprocessing.canvas import resize_by_area
from preprocessing.pipeline import Pipeline
from preprocessing.quality import mean_keypoint_score
from preprocessing.settings import ModelFiles, Settings, find_videos
from preprocessing.video import decode_frames, encode_mp4, probe, psnr_db, sha256_file
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import CLIPS_SCHEMA, clip_id, clips_features, unpack_mask

DEMO = Path(__file__).parents[2] / "demo"
MODELS = ModelFiles(
    detector=DEMO / "models/person_detector.onnx",
    pose=DEMO / "models/wholebody133.onnx",
    segmenter=DEMO / "models/person_segmenter.onnx",
)
SMALL = {"num_frames": 5, "fps": 10.0, "area": 160 * 288}


def pipeline(**changes) -> Pipeline:
    return Pipeline(Settings(**{**SMALL, **changes}), MODELS, num_threads=2)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The first 33 frames of the walker: two clips of 5 frames at 10 fps, and one frame more."""
    path = tmp_path_factory.mktemp("videos") / "short.mp4"
    frames = decode_frames(DEMO / "videos/walker.mp4", range(33)).frames_rgb
    path.write_bytes(encode_mp4(frames, 30.0, preset="ultrafast")[0])
    return path


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    """A finished run over `short`: its folder, its counts and its dataset."""
    output = tmp_path_factory.mktemp("run") / "clips"
    counts = run(pipeline(caption="a woman walks"), [short], output)
    return output, counts, store.load(output, CLIPS_SCHEMA)


def write_video(path: Path, frames) -> Path:
    path.write_bytes(encode_mp4(frames, 30.0, preset="ultrafast")[0])
    return path


def test_a_row_is_complete(trained, short):
    _, counts, clips = trained
    assert counts == {"todo": 1, "clips": 2, "finished": 1, "rejected": 0}
    assert set(clips.column_names) == set(clips_features())
    for start, row in zip((0.0, 0.5), clips, strict=True):
        assert [name for name, value in row.items() if value is None] == []
        assert row["clip_id"] == clip_id("short", sha256_file(short), start, 0)
        assert row["source"]["sha256"] == sha256_file(short)
        assert row["source"]["start_seconds"] == pytest.approx(start)
        assert row["source"]["end_seconds"] == pytest.approx(start + 5 / 10)
        assert (row["caption"], row["purpose"], row["modes"]) == (
            "a woman walks", "train", ["animation", "replacement"],
        )  # fmt: skip
        assert (row["num_frames"], row["fps"]) == (5, 10.0)
        assert (row["height"], row["width"]) == (row["canvas_height"], row["canvas_width"]) == (272, 160)
        np.testing.assert_allclose(np.diff(row["timestamps"]), 1 / 10, atol=1e-6)
        assert all(np.isfinite(value) for value in row["quality"].values())


def test_the_parts_of_a_clip_belong_to_each_other(trained):
    for row in trained[2].with_format("numpy"):
        clip = load_clip(row)
        assert clip.frames_rgb.shape == (5, 272, 160, 3)
        assert clip.reference_rgb.shape == (272, 160, 3)
        assert clip.faces_rgb.shape == (5, 512, 512, 3)
        assert (clip.boxes[:, 4] > 0).all()
        # Mask and visible key points lie on the person that the boxes frame.
        for mask, (x1, y1, x2, y2, _) in zip(clip.mask, clip.boxes):
            y, x = np.nonzero(mask)
            assert x1 < x.mean() < x2 and y1 < y.mean() < y2
        seen = clip.pose_keypoints[:, :20, 2] >= 0.5
        np.testing.assert_array_equal(seen, np.isfinite(clip.pose_keypoints[:, :20, 0]))
        nose = clip.keypoints[:, 0]
        np.testing.assert_allclose(clip.pose_keypoints[:, 0][seen[:, 0]], nose[seen[:, 0]], rtol=1e-5)


def test_video_is_close_to_the_resized_source_and_masks_are_lossless(trained, short):
    measured = pipeline(caption="a woman walks")
    track = measured._measure(probe(short))
    for number, row in enumerate(trained[2]):
        window = slice(5 * number, 5 * number + 5)
        frames = track.frames_rgb[window]
        assert psnr_db(load_clip(row).frames_rgb, frames) >= 42
        mask = measured.segmenter(frames, track.boxes[window])
        np.testing.assert_array_equal(unpack_mask(row["mask"], mask.shape), mask)
        expected = mean_keypoint_score(track.keypoints[window])
        assert row["quality"]["mean_keypoint_score"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_another_moment_of_the_same_video(trained, short):
    frames = decode_frames(short).frames_rgb
    for row in trained[2]:
        source, inside = row["reference_source"], row["source"]
        assert source["kind"] == "frame"
        assert not inside["start_seconds"] <= source["seconds"] < inside["end_seconds"]
        expected = resize_by_area(frames[round(source["seconds"] * 30)], SMALL["area"], 16)
        np.testing.assert_array_equal(np.asarray(row["reference"]), expected)


def test_provenance_says_how_a_clip_came_about(trained):
    provenance = json.loads(trained[2][0]["provenance"])
    assert provenance["video_encoder"]["psnr_db"] >= 42
    assert provenance["face_video_encoder"]["codec"] == "libx264"
    assert {"av", "cv2", "decord", "numpy", "onnxruntime"} <= set(provenance["tools"])
    settings = provenance["settings"]
    assert settings["models"]["pose"] == sha256_file(MODELS.pose)
    assert {name: settings[name] for name in SMALL} == SMALL
    assert trained[2][0]["settings_hash"] == store.settings_hash(settings)


def test_running_again_has_nothing_to_do(trained, short, monkeypatch):
    output = trained[0]
    before = {path: path.read_bytes() for path in output.rglob("*.arrow")}
    monkeypatch.chdir(short.parent)
    counts = run(pipeline(caption="a woman walks"), [Path("short.mp4")], output)  # the same file by another path
    assert counts == {"todo": 0, "clips": 0, "finished": 1, "rejected": 0}
    assert {path: path.read_bytes() for path in output.rglob("*.arrow")} == before


def test_a_run_that_was_killed_after_its_clips_adds_none_twice(trained, short, tmp_path):
    output = tmp_path / "clips"
    shutil.copytree(trained[0], output)
    (output / "finished.jsonl").write_text('{"path": "/cut sho')
    counts = run(pipeline(caption="a woman walks"), [short], output)
    assert (counts["todo"], counts["clips"], counts["finished"]) == (1, 0, 1)
    assert len(store.load(output, CLIPS_SCHEMA)) == 2


def test_changed_settings_do_not_enter_an_existing_dataset(trained, short):
    with pytest.raises(ValueError, match=r"num_frames: 5 there, 9 now.*choose another output folder"):
        run(pipeline(caption="a woman walks", num_frames=9), [short], trained[0])
    with pytest.raises(ValueError, match="caption: 'a woman walks' there, 'another' now"):
        run(pipeline(caption="another"), [short], trained[0])


def test_a_folder_with_other_files_is_left_alone(short, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and was not made by wan-accel"):
        run(pipeline(), [short], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_videos_are_noted_and_the_others_finished(short, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.pipeline._CHUNK_FRAMES", 6)
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    (videos / "a_noise.mp4").write_bytes(rng.bytes(20_000))
    whole = short.read_bytes()
    (videos / "b_cut.mp4").write_bytes(whole[: len(whole) // 2])
    gradient = np.linspace(60, 200, 160)[None, None, :, None] * np.ones((16, 120, 1, 3))
    write_video(videos / "c_nobody.mp4", gradient.astype(np.uint8))
    write_video(videos / "d_brief.mp4", decode_frames(short, range(8)).frames_rgb)
    shutil.copy(short, videos / "e_good.mp4")
    output = tmp_path / "clips"
    counts = run(pipeline(max_clips=1), find_videos([videos]), output)
    assert counts == {"todo": 5, "clips": 1, "finished": 1, "rejected": 4}
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name: entry["reason"] for entry in rejected} == {
        "a_noise.mp4": "unreadable", "b_cut.mp4": "unreadable", "c_nobody.mp4": "no_person", "d_brief.mp4": "too_short",
    }  # fmt: skip
    assert "no stretch of 5 frames at 10 fps" in rejected[3]["detail"] and "longest 3" in rejected[3]["detail"]
    assert [row["source"]["path"] for row in store.load(output, CLIPS_SCHEMA)] == [str(videos / "e_good.mp4")]


def test_a_run_that_gives_nothing_says_why(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"nothing of use" * 100)
    with pytest.raises(ValueError, match=r"no video gave a clip: .*noise\.mp4"):
        run(pipeline(), [tmp_path / "noise.mp4"], tmp_path / "clips")


def test_two_copies_of_a_video_give_each_clip_once(short, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.pipeline._CHUNK_FRAMES", 6)
    copies = [tmp_path / "a/short.mp4", tmp_path / "b/short.mp4"]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(short, copy)
    counts = run(pipeline(max_clips=1), find_videos([tmp_path, copies[0]]), tmp_path / "clips")
    assert (counts["todo"], counts["clips"], counts["finished"]) == (2, 1, 2)


@pytest.fixture(scope="module")
def drives(short):
    """Driving rows of `short` for the same character, fitted to him and not."""
    picture = str(DEMO / "reference/man.png")
    fitted, plain = (pipeline(purpose="drive", reference=picture, retarget=retarget) for retarget in (True, False))
    return fitted, list(fitted.process(short)), list(plain.process(short))


def test_drive_puts_the_pose_on_the_characters_canvas(drives):
    for row in (*drives[1], *drives[2]):
        assert (row["purpose"], row["modes"]) == ("drive", ["animation"])
        assert (row["height"], row["width"]) == (272, 160)
        assert row["reference_source"] == {"kind": "image", "seconds": None}
        reference = Image.open(io.BytesIO(row["reference"]["bytes"]))
        assert (row["canvas_height"], row["canvas_width"]) == reference.size[::-1] == (256, 160)


def test_a_fitted_skeleton_is_as_tall_as_the_character(drives):
    fitted, plain = (
        np.nanmedian(np.concatenate([row["pose_keypoints"] for row in rows])[:, [0, 10, 13], 1], axis=0)
        for rows in drives[1:]
    )
    character = drives[0].character.metas
    expected = character.body[0, [0, 10, 13], 1] * character.height
    height = expected[1:].mean() - expected[0]
    errors = [abs(points[1:].mean() - points[0] - height) / height for points in (fitted, plain)]
    assert errors[0] < 0.06 and errors[1] > 0.1, errors


def test_fitted_bones_stay_bones_in_every_frame(drives):
    """Seen from the side, shoulders are short: a fit on such a frame would make them wider than the picture."""
    pose = np.concatenate([row["pose_keypoints"] for row in drives[1]])
    character = drives[0].character.metas
    own = character.body[0, [2, 5], :2] * [character.width, character.height]
    widths = np.linalg.norm(pose[:, 2, :2] - pose[:, 5, :2], axis=1)
    assert np.nanmax(widths) < 1.3 * np.linalg.norm(own[0] - own[1])


def test_clips_skip_frames_without_the_person():
    boxes = np.ones((22, 5))
    boxes[[3, 10], 4] = -1
    assert pipeline()._windows(boxes) == [slice(4, 9), slice(11, 16), slice(16, 21)]


def test_max_clips_measures_no_more_than_it_needs_and_changes_no_clip(trained, short, monkeypatch):
    monkeypatch.setattr("preprocessing.pipeline._CHUNK_FRAMES", 3)
    limited = pipeline(caption="a woman walks", max_clips=1)
    assert len(limited._measure(probe(short)).frames_rgb) == 6
    (row,) = limited.process(short)
    for name in ("clip_id", "timestamps", "mask"):
        assert row[name] == trained[2][0][name]
    assert row["video"]["bytes"] == trained[2][0]["video"]["bytes"]
    np.testing.assert_array_equal(row["boxes"], np.float32(trained[2][0]["boxes"]))


def test_a_picture_without_a_person_cannot_be_retargeted_to(tmp_path):
    Image.new("RGB", (320, 320), (90, 120, 90)).save(tmp_path / "meadow.png")
    with pytest.raises(ValueError, match=r"meadow\.png: no person found, which --retarget needs"):
        pipeline(purpose="drive", reference=str(tmp_path / "meadow.png"), retarget=True)


def test_a_video_too_small_for_the_area_is_rejected(short, tmp_path):
    with pytest.raises(ValueError, match=r"no video gave a clip: .*give a larger area"):
        run(pipeline(area=200), [short], tmp_path / "clips")
