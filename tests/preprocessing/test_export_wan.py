"""Folders for Wan2.2's generate.py: read back with what reads them there (decord, cv2) and in DiffSynth (VideoData)."""

import json
from fractions import Fraction

import av
import cv2
import decord
import numpy as np
import pytest
from diffsynth.utils.data import VideoData
from PIL import Image
from small_runs import DEMO, part_of, run_job
from tiny_clips import clip_row, square_video, write_clips

from preprocessing import export_wan as export_wan_module
from preprocessing.cli import main
from preprocessing.encoding import psnr_db
from preprocessing.export_wan import export_wan
from preprocessing.mask_growth import MaskGrowth
from preprocessing.selection import Selection
from wan_accel.data import store
from wan_accel.data.clips import decode_mp4, load_clip
from wan_accel.data.schema import ANIMATE_COLUMNS, CLIPS_SCHEMA, pack_mask
from wan_accel.data.skeleton import draw_poses

ALL_FILES = ["src_bg.mp4", "src_face.mp4", "src_mask.mp4", "src_pose.mp4", "src_ref.png"]


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """A dataset of one real training clip, 9 frames of the walker at 10 a second."""
    root = tmp_path_factory.mktemp("walker")
    video = part_of("walker.mp4", root / "walker.mp4", range(30))
    run_job([video], root / "clips", num_frames=9, max_clips=1)
    return root / "clips"


@pytest.fixture(scope="module")
def exported(walker, tmp_path_factory):
    """The walker's folder and its decoded clip."""
    output = tmp_path_factory.mktemp("exported") / "wan"
    assert export_wan(walker, output).written == 1
    clip = load_clip(store.load(walker, CLIPS_SCHEMA)[0])
    return output / clip.clip_id, clip


def read_decord(path) -> np.ndarray:
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def read_cv2(path) -> np.ndarray:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return np.stack(frames)


def read_diffsynth(path) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in VideoData(str(path)).raw_data()])


@pytest.mark.parametrize("read", [read_decord, read_cv2, read_diffsynth])
def test_every_reader_finds_every_frame(exported, read):
    folder, clip = exported
    grown = MaskGrowth()(clip.mask)
    background = np.where(grown[..., None], 0, clip.frames_rgb).astype(np.uint8)
    assert sorted(path.name for path in folder.iterdir()) == ALL_FILES
    assert psnr_db(read(folder / "src_pose.mp4"), draw_poses(clip.pose_keypoints, clip.canvas_hw)) > 40
    assert psnr_db(read(folder / "src_bg.mp4"), background) > 40
    assert psnr_db(read(folder / "src_face.mp4"), clip.faces_rgb) > 40
    assert read(folder / "src_face.mp4").shape == (9, 512, 512, 3)
    mask = read(folder / "src_mask.mp4")
    assert (mask == grown[..., None] * 255).all()  # also where Wan2.2 reads it: the first channel, over 255


def test_our_own_reader_finds_the_quality_that_clips_have(exported):
    folder, clip = exported
    pose = decode_mp4((folder / "src_pose.mp4").read_bytes())
    assert psnr_db(pose, draw_poses(clip.pose_keypoints, clip.canvas_hw)) >= 42
    background = np.where(MaskGrowth()(clip.mask)[..., None], 0, clip.frames_rgb).astype(np.uint8)
    assert psnr_db(decode_mp4((folder / "src_bg.mp4").read_bytes()), background) >= 42


def test_faces_and_reference_are_the_stored_bytes(exported, walker):
    folder, clip = exported
    row = store.load(walker, CLIPS_SCHEMA).data
    assert (folder / "src_face.mp4").read_bytes() == row.column("face_video")[0].as_py()["bytes"]
    assert (folder / "src_ref.png").read_bytes() == row.column("reference")[0].as_py()["bytes"]
    assert (np.asarray(Image.open(folder / "src_ref.png")) == clip.reference_rgb).all()


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(24), Fraction(24000, 1001), Fraction(25, 2)])
def test_the_rate_and_the_number_of_frames_are_exact(tmp_path, rate):
    """moviepy loses the last frame at 24 of 30 and rounds the rate to two decimals."""
    dataset = write_clips(tmp_path / "clips", [clip_row(0, num_frames=25, hw=(64, 64), fps=float(rate))])
    export_wan(dataset, tmp_path / "out")
    for name in ("src_pose.mp4", "src_bg.mp4", "src_mask.mp4"):
        with av.open(str(tmp_path / "out/square0" / name)) as container:
            (stream,) = container.streams.video
            assert (stream.average_rate, stream.frames) == (rate, 25)
            assert sum(1 for _ in container.decode(stream)) == 25


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        (MaskGrowth(iterations=0), (slice(12, 28), slice(4, 16))),
        (MaskGrowth(iterations=1, k=3), (slice(11, 29), slice(3, 17))),  # a square: its rectangle is itself
    ],
)
def test_masks_grow_as_asked(tmp_path, growth, expected):
    dataset = write_clips(tmp_path / "clips", [clip_row(0, hw=(64, 64))])
    export_wan(dataset, tmp_path / "out", growth=growth)
    mask = read_decord(tmp_path / "out/square0/src_mask.mp4")[0]
    wanted = np.zeros((64, 64, 3), np.uint8)
    wanted[expected] = 255
    assert (mask == wanted).all()


def test_the_defaults_are_the_originals(tmp_path):
    """A person with gaps becomes a rectangle that a 7 x 7 square, 3 times, has grown by 9 pixels to each side."""
    _, mask = square_video(5, (64, 64), seed=0)
    mask[:, 12:20, :8] = False
    dataset = write_clips(tmp_path / "clips", [clip_row(0, hw=(64, 64), mask=pack_mask(mask))])
    export_wan(dataset, tmp_path / "out")
    drawn = read_decord(tmp_path / "out/square0/src_mask.mp4")[0, ..., 0] > 127
    ys, xs = np.nonzero(drawn)
    assert drawn[ys.min() : ys.max() + 1, xs.min() : xs.max()].all()
    assert (ys.min(), ys.max()) == (12 - 9, 27 + 9)


def test_a_driving_clip_has_what_animation_needs(tmp_path):
    row = clip_row(0, purpose="drive", modes=["animation"], canvas_height=96, canvas_width=64, mask=None)
    dataset = write_clips(tmp_path / "clips", [row])
    export_wan(dataset, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/square0").iterdir()) == [
        "src_face.mp4", "src_pose.mp4", "src_ref.png",
    ]  # fmt: skip
    assert read_decord(tmp_path / "out/square0/src_pose.mp4").shape == (5, 96, 64, 3)


def test_a_real_driving_clip_leaves_on_the_references_canvas(tmp_path):
    video = part_of("jumping.mp4", tmp_path / "jumping.mp4", range(20))
    man = str(DEMO / "reference/man.png")
    run_job([video], tmp_path / "clips", purpose="drive", reference=man, retarget="one_step", max_clips=1)
    assert main(["export", str(tmp_path / "clips"), "--layout=wan", f"--output={tmp_path / 'out'}"]) == 0
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    pose, reference = read_decord(folder / "src_pose.mp4"), np.asarray(Image.open(folder / "src_ref.png"))
    assert pose.shape == (5, *reference.shape) and (pose > 60).any(axis=(1, 2, 3)).all()


@pytest.fixture
def three(tmp_path):
    return write_clips(tmp_path / "clips", [clip_row(number) for number in range(3)])


def test_an_interrupted_export_goes_on(three, tmp_path, monkeypatch):
    output, whole = tmp_path / "out", export_wan_module.wan_files

    def killed(row, growth):
        if row["clip_id"] == "square1":
            raise KeyboardInterrupt
        return whole(row, growth)

    with monkeypatch.context() as patch:
        patch.setattr(export_wan_module, "wan_files", killed)
        with pytest.raises(KeyboardInterrupt):
            export_wan(three, output)
    assert [path.name for path in sorted(output.iterdir()) if path.is_dir()] == [".square1.tmp", "square0"]
    before = (output / "square0/src_pose.mp4").stat().st_mtime_ns
    done = export_wan(three, output)
    assert (done.written, done.kept) == (2, 1)
    assert (output / "square0/src_pose.mp4").stat().st_mtime_ns == before
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["square0", "square1", "square2"]
    assert all(sorted(f.name for f in (output / f"square{n}").iterdir()) == ALL_FILES for n in range(3))


def test_only_the_chosen_clips_leave_and_others_may_follow(three, tmp_path):
    export_wan(three, tmp_path / "out", selection=Selection(clips=["square2"]))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["square2"]
    assert export_wan(three, tmp_path / "out").kept == 1


def test_other_settings_or_another_dataset_are_refused(three, tmp_path):
    export_wan(three, tmp_path / "out")
    with pytest.raises(store.StoreError, match=r"made with other settings \(iterations: 3 there, 1 now\)"):
        export_wan(three, tmp_path / "out", growth=MaskGrowth(iterations=1))
    other = write_clips(tmp_path / "other", [clip_row(0)], settings={"made by": "another test"})
    with pytest.raises(store.StoreError, match=r"made with other settings \(dataset: "):
        export_wan(other, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(store.StoreError, match="mine is not empty and was not made by wan-accel"):
        export_wan(three, tmp_path / "mine")


def test_clips_that_lack_something_are_named_at_once(tmp_path):
    rows = [clip_row(0), clip_row(1, face_video=None), clip_row(2, face_video=None, mask=None), clip_row(3, modes=[])]
    dataset = write_clips(tmp_path / "clips", rows)
    expected = "no face_video in clips square1, square2; no mask in clip square2; no modes in clip square3: leave them"
    with pytest.raises(ValueError, match=expected):
        export_wan(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_wan(dataset, tmp_path / "out", selection=Selection(clips=["square0"])).written == 1


def test_clips_without_people_have_nothing_to_draw(tmp_path):
    plain = {name: value for name, value in clip_row(0).items() if name not in ANIMATE_COLUMNS}
    dataset = write_clips(tmp_path / "clips", [plain])
    with pytest.raises(ValueError, match=r"cut without looking for people .*use --layout diffsynth, parquet or hub"):
        export_wan(dataset, tmp_path / "out")


def test_the_command_says_what_it_did_and_refuses_what_a_layout_lacks(three, tmp_path, capsys):
    export = ["export", str(three), "--layout", "wan", "--output", str(tmp_path / "out")]
    assert main([*export, "--iterations=0", "--where", "clip_id == square1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 1 clips written\n"
    run_file = json.loads((tmp_path / "out/wan_accel_run.json").read_text())
    assert (run_file["settings"]["iterations"], run_file["settings"]["k"]) == (0, 7)
    assert main([*export, "--iterations=0"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 2 clips written, 1 were there\n"
    for options, message in (
        (["--repo-id=a/b", "--private"], "--layout wan has no --private, --repo-id: leave it out"),
        (["--metadata=json"], "--layout wan has no --metadata"),
        (["--k=0", "--w_len=0"], "--k 0: give 1 or more; --w_len 0: give 1 or more"),
        (["--iterations=-1"], "--iterations -1: give 0 or more"),
    ):
        assert main([*export, *options]) == 2
        assert message in capsys.readouterr().err
