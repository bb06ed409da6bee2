import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import (
    DEMO,
    MODELS,
    SMALL,
    part_of,
    pipeline,
    process,
    rejections,
    run_job,
    write_video,
)
from synthetic_videos import write_video as write_numbered_video

from preprocessing.canvas import resize_by_area
from preprocessing.inputs import Source, find_sources
from preprocessing.pipeline import Rejected
from preprocessing.quality import mean_keypoint_score
from preprocessing.thresholds import Bound
from preprocessing.types import Person
from preprocessing.video import decode_frames, psnr_db, sha256_file
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import ANIMATE_COLUMNS, CLIPS_SCHEMA, clip_id, clips_features, unpack_mask


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The first 33 frames of the walker: two clips of 5 frames at 10 fps, and one frame more."""
    return part_of("walker.mp4", tmp_path_factory.mktemp("videos") / "short.mp4", range(33))


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    """A finished run over `short`: its folder, its summary and its dataset."""
    output = tmp_path_factory.mktemp("run") / "clips"
    summary = run_job([short], output, caption="a woman walks")
    return output, summary, store.load(output, CLIPS_SCHEMA)


def test_a_row_is_complete(trained, short):
    _, summary, clips = trained
    assert (summary.todo, summary.clips, summary.finished, summary.rejected) == (1, 2, 1, 0)
    assert set(clips.column_names) == set(clips_features())
    for start, row in zip((0.0, 0.5), clips, strict=True):
        missing = [name for name, value in row.items() if value is None or (np.ndim(value) == 0 and value != value)]
        assert missing == ["keypoints_3d"]
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
    networks = pipeline(caption="a woman walks").networks
    for row in trained[2].with_format("numpy"):
        clip = load_clip(row)
        indices = np.round(np.asarray(row["timestamps"]) * 30).astype(int)
        source = decode_frames(short, indices).frames_rgb
        frames = np.stack([resize_by_area(frame, SMALL["area"], 16) for frame in source])
        assert psnr_db(clip.frames_rgb, frames) >= 42
        person = Person(boxes_xyxys=np.asarray(row["boxes"], np.float64), keypoints=np.asarray(row["keypoints"]))
        mask = networks.segmenter(frames, person)
        assert (unpack_mask(bytes(row["mask"]), mask.shape) != mask).mean() < 1e-4  # boxes are stored as float32
        keypoints = networks.pose(frames, person.boxes_xyxys).keypoints
        np.testing.assert_allclose(keypoints, row["keypoints"], atol=0.05)
        assert row["quality"]["mean_keypoint_score"] == pytest.approx(mean_keypoint_score(keypoints), rel=1e-3)


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
    assert {"av", "cv2", "numpy", "onnxruntime", "trackers"} <= set(provenance["tools"])
    settings = provenance["settings"]
    assert settings["models"]["pose"] == sha256_file(MODELS.pose)
    assert {name: settings[name] for name in SMALL} == SMALL
    assert trained[2][0]["settings_hash"] == store.settings_hash(settings)


def test_a_folder_with_other_files_is_left_alone(short, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and was not made by wan-accel"):
        run_job([short], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_videos_are_noted_and_the_others_finished(short, tmp_path):
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
    summary = run_job([source.path for source in find_sources([str(videos)])], output, max_clips=1)
    assert (summary.todo, summary.clips, summary.finished, summary.rejected) == (5, 1, 1, 4)
    rejected = rejections(output)
    assert {Path(entry["path"]).name: entry["reason"] for entry in rejected} == {
        "a_noise.mp4": "unreadable", "b_cut.mp4": "unreadable", "c_nobody.mp4": "no_person", "d_brief.mp4": "too_short",
    }  # fmt: skip
    assert "no stretch of 5 frames at 10 fps" in rejected[3]["detail"] and "longest 3" in rejected[3]["detail"]
    assert [row["source"]["path"] for row in store.load(output, CLIPS_SCHEMA)] == [str(videos / "e_good.mp4")]


def test_two_copies_of_a_video_give_each_clip_once(short, tmp_path):
    copies = [tmp_path / "a/short.mp4", tmp_path / "b/other.mp4"]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(short, copy)
    summary = run_job([*copies, copies[0]], tmp_path / "clips", workers=2, max_clips=1)
    assert (summary.clips, summary.finished, summary.rejected) == (1, 1, 1)
    (entry,) = rejections(tmp_path / "clips")
    assert entry["reason"] == "duplicate" and "the same file as" in entry["detail"]


def test_clips_that_are_not_good_enough_are_rejected_with_their_figures(short, tmp_path):
    bounds = {"hand_score": Bound(min=0.99), "track_switches": Bound(max=0)}
    items = process(pipeline(quality=bounds), short)
    assert [(item.clip_id[:5], item.reason) for item in items] == [("short", "quality.hand_score")] * 2
    assert "hand_score is 0." in items[0].detail and "at least 0.99 is asked for" in items[0].detail
    assert items[0].quality["visible_share"] > 0.5
    run_job([short], tmp_path / "clips", quality=bounds)
    assert [r["clip_id"] for r in rejections(tmp_path / "clips")] == [item.clip_id for item in items]
    assert rejections(tmp_path / "clips")[0]["quality"]["hand_score"] == pytest.approx(items[0].quality["hand_score"])


def test_clips_without_person_models_have_no_person_columns(short, tmp_path):
    run_job([short], tmp_path / "clips", kind="clips", divisor=32, caption="a street")
    clips = store.load(tmp_path / "clips", CLIPS_SCHEMA)
    assert set(clips.column_names) == set(clips_features()) - set(ANIMATE_COLUMNS)
    assert [(row["height"], row["width"], row["caption"]) for row in clips] == [(256, 160, "a street")] * 2
    assert clips[0]["quality"]["luma_change"] > 1 and clips[0]["quality"]["hand_score"] is None
    assert load_clip(clips[0]).frames_rgb.shape == (5, 256, 160, 3)


def test_a_manifests_interval_caption_and_reference_count(short):
    made = pipeline(caption="nothing said", reference="column")
    picture = str(DEMO / "reference/woman.png")
    rows = process(made, short, start_seconds=0.3, end_seconds=0.9, caption="she walks", reference=picture)
    assert [row["timestamps"] for row in rows] == [pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7], abs=1e-6)]
    assert rows[0]["caption"] == "she walks"
    assert rows[0]["reference_source"] == {"kind": "image", "seconds": None}
    assert Image.open(io.BytesIO(rows[0]["reference"]["bytes"])).size == (160, 272)
    with pytest.raises(Rejected, match="names no reference"):
        process(made, short)
    with pytest.raises(Rejected, match=r"no frame between 7\.0 and 8\.0 s, it lasts 1\.10 s"):
        process(made, short, start_seconds=7.0, end_seconds=8.0, reference=picture)


def test_overlapping_clips_and_the_first_frame_as_reference(short):
    rows = process(pipeline(stride=3, reference="first"), short)
    assert [row["source"]["start_seconds"] for row in rows] == pytest.approx([0.0, 0.3, 0.6])
    assert [row["reference_source"]["seconds"] for row in rows] == [0.0] * 3


def test_all_people_give_a_clip_each(tmp_path):
    video = part_of("two_people.mp4", tmp_path / "two.mp4", range(36))
    rows = process(pipeline(people="all", num_frames=9, area=320 * 256), video)
    assert [row["clip_id"].split("-")[-2:] for row in rows] == [["0", "0"], ["0", "1"]]
    first, second = (np.asarray(row["boxes"])[:, :4] for row in rows)
    assert (first[:, 2] < second[:, 0]).all()
    masks = [unpack_mask(row["mask"], (9, row["height"], row["width"])) for row in rows]
    assert all(mask.any() for mask in masks) and not (masks[0] & masks[1]).any()


def test_the_profile_upstream_goes_the_originals_way(short):
    rows = process(pipeline(profile="upstream"), short)
    assert [(row["height"], row["width"]) for row in rows] == [(272, 160)] * 2
    boxes = np.asarray(rows[0]["boxes"])
    np.testing.assert_array_equal(boxes[:, :4], np.round(boxes[:, :4]))  # as the detector gave them, not smoothed


@pytest.fixture(scope="module")
def drives(short):
    """Driving rows of `short` for the same character, fitted to him and not."""
    picture = str(DEMO / "reference/man.png")
    fitted, plain = (pipeline(purpose="drive", reference=picture, retarget=how) for how in ("one_step", "none"))
    character = fitted.characters.of(Source(path=str(short)))
    return character, process(fitted, short), process(plain, short)


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
    character = drives[0].metas
    expected = character.body[0, [0, 10, 13], 1] * character.height
    height = expected[1:].mean() - expected[0]
    errors = [abs(points[1:].mean() - points[0] - height) / height for points in (fitted, plain)]
    assert errors[0] < 0.06 and errors[1] > 0.1, errors


def test_fitted_bones_stay_bones_in_every_frame(drives):
    """Seen from the side, shoulders are short: a fit on such a frame would make them wider than the picture."""
    pose = np.concatenate([row["pose_keypoints"] for row in drives[1]])
    character = drives[0].metas
    own = character.body[0, [2, 5], :2] * [character.width, character.height]
    widths = np.linalg.norm(pose[:, 2, :2] - pose[:, 5, :2], axis=1)
    assert np.nanmax(widths) < 1.3 * np.linalg.norm(own[0] - own[1])


def test_max_clips_changes_no_clip(trained, short):
    (row,) = process(pipeline(caption="a woman walks", max_clips=1), short)
    for name in ("clip_id", "timestamps", "mask"):
        assert row[name] == trained[2][0][name]
    assert row["video"]["bytes"] == trained[2][0]["video"]["bytes"]
    np.testing.assert_array_equal(row["boxes"], np.float32(trained[2][0]["boxes"]))


def test_a_picture_without_a_person_cannot_be_retargeted_to(tmp_path):
    Image.new("RGB", (320, 320), (90, 120, 90)).save(tmp_path / "meadow.png")
    with pytest.raises(ValueError, match=r"meadow\.png: no person found, which --retarget needs"):
        pipeline(purpose="drive", reference=str(tmp_path / "meadow.png"), retarget="one_step")


def test_a_video_too_small_for_the_area_is_rejected(short, tmp_path):
    run_job([short], tmp_path / "clips", area=200)
    (entry,) = rejections(tmp_path / "clips")
    assert entry["reason"] == "unusable" and "give a larger area" in entry["detail"]


@pytest.mark.parametrize("profile", ["wan", "upstream"])
def test_a_video_with_a_wrong_time_in_it_is_rejected_and_its_sound_part_can_be_asked_for(tmp_path, profile):
    """A damaged time of three hours would become thousands of clips of one frame."""
    path = tmp_path / "gap.mkv"
    write_numbered_video(path, range(30), pts_ms=[i * 40 + (i >= 15) * 10**7 for i in range(30)])
    made = pipeline(kind="clips", profile=profile, fps=25.0)
    with pytest.raises(Rejected, match=r"frame 14 of 30 is shown for 10000 s, from 0\.56 s on: its times are damaged"):
        process(made, path)
    if profile == "wan":  # average rates say nothing of an interval here
        assert len(process(made, path, end_seconds=0.5)) == 2
