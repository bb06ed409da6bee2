"""The weaknesses of Wan2.2's own preprocessing, one test each: the product does not have them.

Their numbers are those of the table in the notes on the original code. The parity tests show that `--profile upstream`
still behaves as it does; here the default profile, the command and the job are looked at.
"""

import ast
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from counting_network import COUNTED, write_counting_network
from PIL import Image
from small_runs import (
    DEMO,
    MODELS,
    main_people,
    part_of,
    pipeline,
    process,
    rejections,
    rows_of,
    run_job,
    settings,
    write_video,
)
from synthetic_videos import number_shown
from synthetic_videos import write_video as write_numbered_video
from test_retarget import BODY_XY, person

from preprocessing.canvas import canvas_hw
from preprocessing.cli import main
from preprocessing.edit_prompts import edit_prompt
from preprocessing.face import face_boxes
from preprocessing.inputs import Source
from preprocessing.masks import block_augment, dilate
from preprocessing.networks import open_detector, open_pose
from preprocessing.pipeline import Pipeline, Rejected
from preprocessing.pose import pose62
from preprocessing.prompts import frame_prompts
from preprocessing.retarget import fit_retargeting, retarget
from preprocessing.settings import ModelFiles, Runtime
from preprocessing.skeleton import draw_poses
from preprocessing.thresholds import Bound
from preprocessing.types import PROFILES, Person, PoseMetas
from preprocessing.video import decode_frames, sha256_file
from preprocessing.video_segmenter import VideoSegmenter
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import unpack_mask
from wan_accel.data.skeleton import LEFT_HAND, RIGHT_HAND

UPSTREAM = PROFILES["upstream"]
MAN = DEMO / "reference/man.png"


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    return part_of("walker.mp4", tmp_path_factory.mktemp("videos") / "short.mp4", range(16))


@pytest.fixture(scope="module")
def row(short) -> dict:
    """A clip for training."""
    return process(pipeline(max_clips=1), short)[0]


def test_weakness_01_the_whole_video_in_memory(tmp_path):
    peaks = []
    for num_frames in (160, 160, 1600):  # the first one loads modules
        video = write_numbered_video(tmp_path / "still.mp4", [5] * num_frames)
        made = pipeline(kind="clips", num_frames=9, fps=25.0, area=64 * 128)
        tracemalloc.start()
        num_rows = sum(1 for _ in made.process(Source(path=str(video)), video))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert num_rows == num_frames // 9
    assert peaks[2] < 1.15 * peaks[1], peaks


def test_weakness_02_one_frame_at_a_time_and_the_first_one_twice(short, tmp_path):
    """The networks say by their scores how many frames they saw together."""
    box = np.zeros((4, 6), np.float32)
    box[0, :5] = 10, 10, 50, 50, COUNTED
    maps = np.zeros((133, 16, 12), np.float32)
    maps[:, 8, 6] = COUNTED
    networks = ModelFiles(
        detector=write_counting_network(tmp_path / "detector.onnx", (64, 64), box),
        pose=write_counting_network(tmp_path / "pose.onnx", (64, 48), maps),
        segmenter=MODELS.segmenter,
    )
    chosen = settings(fps=30.0, num_frames=9, max_clips=1, quality={}, reference="first")
    (clip,) = process(Pipeline(chosen, networks, runtime=Runtime(batch_frames=16)), short)
    np.testing.assert_allclose(np.asarray(clip["boxes"])[:, 4], 0.16, rtol=1e-5)  # all 16 frames of the video
    np.testing.assert_allclose(np.asarray(clip["keypoints"])[..., 2], 0.09, rtol=1e-5)  # all 9 of the clip, once


def test_weakness_03_no_resume_no_isolation_one_process(short, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(short.read_bytes()[:3000])
    other = part_of("jumping.mp4", tmp_path / "other.mp4", range(16))
    options = {"kind": "clips", "fps": 30.0}
    first = run_job([broken, short], tmp_path / "clips", **options)
    second = run_job([broken, short, other], tmp_path / "clips", workers=2, **options)
    assert (first.todo, first.finished, first.rejected) == (2, 1, 1)
    assert (second.todo, second.finished, second.rejected) == (1, 2, 1)
    assert [(record["path"], record["reason"]) for record in rejections(tmp_path / "clips")] == [
        (str(broken), "unreadable")
    ]
    run_job([broken, short, other], tmp_path / "at_once", workers=2, **options)
    assert rows_of(tmp_path / "clips") == rows_of(tmp_path / "at_once")


def test_weakness_04_largest_box_of_each_frame_without_smoothing(tmp_path):
    video = part_of("two_people.mp4", tmp_path / "two.mp4", range(12))
    options = {"num_frames": 9, "fps": 30.0, "area": 320 * 256, "quality": {}, "people": "all"}
    (man, woman), (original,) = (process(pipeline(profile=name, **options), video) for name in ("wan", "upstream"))
    assert [clip["source"]["track"] for clip in (man, woman)] == [0, 1]
    assert [clip["quality"]["track_switches"] for clip in (man, woman)] == [0, 0]
    assert original["quality"]["track_switches"] >= 2
    steps = [
        np.abs(np.diff(np.asarray(clip["boxes"])[:, [0, 2]].mean(axis=1))).max() for clip in (man, woman, original)
    ]
    assert max(steps[:2]) < 5 and steps[2] > 50


def sam_person(num_frames: int, x: float) -> Person:
    keypoints = np.full((num_frames, 133, 3), 0.9, np.float32)
    keypoints[..., 0], keypoints[..., 1] = x, 30
    boxes = np.tile([x - 10, 10, x + 10, 50, 0.9], (num_frames, 1))
    return Person(boxes_xyxys=boxes, keypoints=keypoints)


def test_weakness_05_blind_prompts_and_no_identity_beyond_a_chunk():
    wanted, other = sam_person(8, 20.0), sam_person(8, 70.0)
    wanted.keypoints[:, 5:7, 2] = 0.2  # shoulders unsure, and with them the neck
    wanted.keypoints[:, 11, 0] = -30  # a hip off the picture
    for prompt in frame_prompts(wanted, [other], (64, 96)):
        on_person, away = prompt.points_xy[prompt.on_person], prompt.points_xy[~prompt.on_person]
        assert len(on_person) == 8 - 3 - 1 and (np.abs(on_person - [20, 30]) <= 1).all()  # whole pixels
        assert len(away) == 2 and (away[:, 0] == 70).all()
        assert prompt.box_xyxy.tolist() == [10, 10, 30, 50]
    blind = frame_prompts(wanted, [other], (64, 96), profile=UPSTREAM)[0]
    assert len(blind.points_xy) == 8 and blind.on_person.all() and blind.box_xyxy is None
    handed_on = []

    def propagate(frames, prompts, first_mask):
        handed_on.append(first_mask is not None and first_mask.sum())
        masks = np.zeros(frames.shape[:3], bool)
        masks[:, 10:50, 10:30] = True
        return masks

    VideoSegmenter(propagate, chunk_frames=4)(np.zeros((8, 64, 96, 3), np.uint8), wanted, [other])
    assert handed_on == [False, 800, 800]


def test_weakness_06_empty_mask_narrow_box_off_screen_face_missing_person_one_frame(short, tmp_path):
    empty, narrow = np.zeros((1, 40, 60), bool), np.zeros((1, 40, 60), bool)
    narrow[0, 5:30, 20:22] = True
    for mask in (empty, narrow):
        grown = dilate(mask, kernel_pixels=7, iterations=0)
        augmented = block_augment(grown[0], num_columns=8, num_rows=8)
        assert augmented.sum() >= mask.sum() and augmented.any() == mask.any()
    off_screen = np.full((3, 69, 3), 0.9, np.float32)
    off_screen[..., :2] = np.linspace([1.2, 0.1], [1.4, 0.3], 69)
    parts = {"body": np.zeros((3, 20, 3)), "left_hand": np.zeros((3, 21, 3)), "right_hand": np.zeros((3, 21, 3))}
    assert face_boxes(PoseMetas(**parts, face=off_screen, width=160, height=272)) is None
    frames = decode_frames(short).frames_rgb
    nobody = np.full_like(frames[:6], 90)
    late = write_video(tmp_path / "late.mp4", np.concatenate([nobody, frames]))
    made = pipeline(fps=30.0, max_clips=1)
    (clip,) = process(made, late)
    assert clip["timestamps"][0] >= 6 / 30 - 1e-6
    with pytest.raises(Rejected, match=r"no stretch of 5 frames at 30 fps with one person in it \(longest 1\)"):
        process(made, write_video(tmp_path / "one.mp4", frames[:1]))


def test_weakness_07_a_size_search_that_never_runs_and_floors_that_lose_a_step(short):
    area = 480 * 832
    assert canvas_hw((832, 480), area, 16, profile=UPSTREAM) == (832, 464)
    (clip,) = process(pipeline(kind="clips", area=area, max_clips=1), short)
    assert (clip["height"], clip["width"]) == (832, 480)
    divisors = [(height, width) for height in range(90, 2200, 111) for width in range(90, 2200, 113)]
    sizes = np.array([canvas_hw(hw, area, 16) for hw in divisors])
    assert (sizes % 16 == 0).all() and (sizes.prod(axis=1) <= area).all()


def test_weakness_08_frames_by_average_rate_and_beyond_the_end(tmp_path):
    """Ten frames 40 ms apart, then ten 120 ms apart: at 12.5 a second every other one, then most of them twice."""
    times = np.concatenate([np.arange(10) * 40, 400 + np.arange(10) * 120])
    video = write_numbered_video(tmp_path / "vfr.mkv", range(20), pts_ms=times, options={"qp": "0"})
    made = pipeline(kind="clips", fps=12.5, num_frames=17, area=112 * 208)
    made.profile = replace(made.profile, shots="ignored")  # the numbers flash like cuts
    (clip,) = process(made, video)
    shown = [number_shown(frame) for frame in load_clip(clip).frames_rgb]
    nearest = [int(np.abs(times - 80 * i + 0.001).argmin()) for i in range(17)]
    assert shown == nearest
    np.testing.assert_allclose(clip["timestamps"], times[nearest] / 1000, atol=1e-6)
    upstream = pipeline(kind="clips", fps=12.5, num_frames=5, area=112 * 208, profile="upstream")
    assert process(upstream, video)  # indices end with the video


def test_weakness_09_lossy_masks_a_lost_frame_jpegs_and_rounded_rates(short, tmp_path):
    photo = tmp_path / "man.jpg"
    Image.open(MAN).convert("RGB").save(photo)
    made = pipeline(purpose="drive", reference=str(photo), fps=24000 / 1001, num_frames=9, max_clips=1)
    (clip,) = process(made, short)
    loaded = load_clip(clip)
    assert len(loaded.frames_rgb) == len(loaded.faces_rgb) == len(loaded.mask) == clip["num_frames"] == 9
    assert clip["fps"] == 24000 / 1001
    assert clip["reference"]["bytes"].startswith(b"\x89PNG")
    people = Person(boxes_xyxys=np.asarray(clip["boxes"], float), keypoints=None)
    masks = made.networks.segmenter(loaded.frames_rgb, people)
    stored = unpack_mask(clip["mask"], masks.shape)
    assert stored.dtype == bool and (stored != masks).mean() < 0.005  # the video is lossy, the mask is not
    assert json.loads(clip["provenance"])["video_encoder"]["psnr_db"] >= 42


def test_weakness_10_guessed_points_swapped_hands_uneven_feet_empty_limbs():
    scores = np.full(20, 0.9)
    scores[[4, 13, 18]] = 0.1
    guessed = BODY_XY.copy()
    guessed[[4, 13, 18]] += 500
    fit = fit_retargeting(person(), person(guessed, scores=scores))
    np.testing.assert_allclose(fit.length_ratios, 1, atol=0.01)
    collapsed = BODY_XY.copy()
    collapsed[3] = collapsed[2]  # an upper arm without length
    fit = fit_retargeting(person(collapsed), person())
    pose = retarget(person(collapsed), fit)
    assert np.isfinite(fit.length_ratios).all() and np.isfinite(pose).all()
    np.testing.assert_allclose(pose[0, LEFT_HAND.start, :2], pose[0, 7, :2], atol=1e-6)
    np.testing.assert_allclose(pose[0, RIGHT_HAND.start, :2], pose[0, 4, :2], atol=1e-6)
    for foot in ([10, 19], [13, 18]):  # whichever foot is in the air, the other one stands on the reference's ground
        lifted = BODY_XY.copy()
        lifted[foot] -= [0, 40]
        pose = retarget(person(lifted), fit_retargeting(person(lifted), person()))
        standing = [13, 18] if foot == [10, 19] else [10, 19]
        assert pose[0, standing, 1].mean() == pytest.approx(BODY_XY[standing, 1].mean(), abs=1e-6)


def test_weakness_11_faces_torn_to_squares_shaking_and_unseen(tmp_path):
    video = part_of("walker.mp4", tmp_path / "walk.mp4", range(18))
    options = {"num_frames": 17, "fps": 30.0, "area": 480 * 832, "max_clips": 1}
    (ours,), (original,) = (process(pipeline(profile=name, **options), video) for name in ("wan", "upstream"))
    sizes = [np.diff(np.asarray(clip["face_boxes"])[:, [[0, 2], [1, 3]]], axis=2)[..., 0] for clip in (ours, original)]
    assert (sizes[0][:, 0] == sizes[0][:, 1]).all()
    assert (np.abs(np.log(sizes[1][:, 0] / sizes[1][:, 1])) > 0.1).any()
    shaking = [np.abs(np.diff(size, 2, axis=0)).mean() for size in sizes]
    assert shaking[0] < 0.4 * shaking[1]


def test_weakness_12_options_without_effect_and_edits_that_cannot_be_repeated(short, row, tmp_path, capsys):
    models = [f"--{name}={getattr(MODELS, name)}" for name in ("detector", "pose", "segmenter")]
    for option in (["--retarget"], ["--flux-seed=1", "--flux=x"], ["--edited-reference", str(MAN)]):
        assert main(["animate", str(short), f"--output={tmp_path / 'out'}", *models, *option]) == 2
        assert "--retarget" in capsys.readouterr().err
    assert row["modes"] == ["animation", "replacement"]
    (driven,) = process(pipeline(purpose="drive", reference=str(MAN), retarget="one_step", max_clips=1), short)
    assert driven["modes"] == ["animation"]  # a fitted pose does not lie on the person that replacement keeps
    chosen = {"purpose": "drive", "reference": str(MAN), "retarget": "two_step", "flux": "x"}
    seeds = [settings(**chosen, flux_seed=seed).described() for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    arms_above = person()
    arms_above.body[:, [3, 4, 6, 7], 1] = -0.2
    arms_above.body[:, [9, 10, 12, 13], 2] = 0.1
    assert edit_prompt(arms_above, (400, 400)) == "Change the person to face forward."
    assert "Hands are visible" in edit_prompt(arms_above, (400, 400), profile=UPSTREAM)


def test_weakness_13_flat_imports_noise_and_mutable_defaults(tmp_path):
    package = Path(sys.modules["preprocessing"].__file__).parent
    names = sorted(f"preprocessing.{path.stem}" for path in package.glob("*.py") if path.stem != "__init__")
    code = f"""
import importlib, sys
import preprocessing.cli, preprocessing.job, preprocessing.pipeline, preprocessing.worker
assert "torch" not in sys.modules
print("quiet", file=sys.stderr)
for name in {names}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith("quiet"), done.stderr
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                defaults = [*node.args.defaults, *node.args.kw_defaults]
                assert not any(isinstance(value, ast.List | ast.Dict | ast.Set) for value in defaults), path
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            assert called != "print" or "import argparse" in path.read_text(), path  # the command's own files


def test_weakness_14_the_pose_network_sees_bgr():
    """Fed as it was trained, the demo's network is surer of hands, and as sure of bodies."""
    frames = decode_frames(DEMO / "videos/walker.mp4", range(0, 90, 15)).frames_rgb
    boxes = main_people(open_detector(MODELS.detector), frames)
    ours, original = (
        np.mean(open_pose(MODELS.pose, profile=PROFILES[name])(frames, boxes).keypoints[:, 91:133, 2])
        for name in ("wan", "upstream")
    )
    assert ours > 1.2 * original


def test_weakness_15_a_whole_chunk_as_float_pictures():
    """The segmenter is handed frames as they are, a chunk at a time; none is larger than the clip's."""
    seen = []

    def propagate(frames, prompts, first_mask):
        seen.append((frames.dtype, frames.shape, np.shares_memory(frames, video)))
        return np.zeros(frames.shape[:3], bool)

    video = np.zeros((50, 64, 96, 3), np.uint8)
    VideoSegmenter(propagate, chunk_frames=16)(video, sam_person(50, 20.0))
    assert {(dtype, shared) for dtype, _, shared in seen} == {(np.dtype(np.uint8), True)}
    assert max(shape[0] for _, shape, _ in seen) == 16


def test_weakness_16_only_pictures_survive(short, row):
    provenance = json.loads(row["provenance"])
    chosen = provenance["settings"]
    assert row["source"]["sha256"] == sha256_file(short)
    assert chosen["models"] == {name: sha256_file(getattr(MODELS, name)) for name in ("detector", "pose", "segmenter")}
    assert {"fps", "num_frames", "profile", "pose_channel_order", "fp16", "quality"} <= set(chosen)
    np.testing.assert_allclose(row["timestamps"], np.arange(5) / 10, atol=1e-6)
    # The drawing can be made again from what was measured.
    keypoints, hw = np.asarray(row["keypoints"], np.float32), (row["height"], row["width"])
    redone = pose62(keypoints, hw)
    np.testing.assert_allclose(redone, row["pose_keypoints"], atol=1e-3)
    assert draw_poses(redone, hw).any(axis=(1, 2, 3)).all()


def test_weakness_17_clips_across_cuts_without_quality_or_caption(short, tmp_path):
    jump = decode_frames(DEMO / "videos/jumping.mp4", range(20)).frames_rgb[:, :768, :480]
    walk = decode_frames(DEMO / "videos/walker.mp4", range(20)).frames_rgb[:, :768]
    video = write_video(tmp_path / "cut.mp4", np.concatenate([walk, jump]))
    (tmp_path / "cut.txt").write_text("a woman walks, a man jumps\n")
    clips = process(pipeline(kind="clips", fps=30.0, num_frames=9), video)
    starts = [round(clip["timestamps"][0] * 30) for clip in clips]
    assert starts == [0, 9, 20, 29]  # end to end, and anew at the cut
    assert {clip["caption"] for clip in clips} == {"a woman walks, a man jumps"}
    sharper = {"blur": Bound(min=1e6), "hand_score": Bound(min=0.0)}
    (bad,) = process(pipeline(quality=sharper, max_clips=1, num_frames=5), short)[:1]
    assert bad.reason == "quality.blur" and bad.quality["face_size"] > 5 and 0 < bad.quality["visible_share"] <= 1
