"""DiffSynth's own dataset class reads what leaves for it."""

import json

import numpy as np
import pytest
from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.operators import ImageCropAndResize, LoadVideo, ToAbsolutePath
from tiny_clips import clip_row, write_clips

from preprocessing.cli import main
from preprocessing.encoding import psnr_db
from preprocessing.export_diffsynth import COLUMNS, export_diffsynth
from preprocessing.mask_growth import MaskGrowth
from preprocessing.selection import Selection
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import ANIMATE_COLUMNS, CLIPS_SCHEMA
from wan_accel.data.skeleton import draw_poses

HW = (64, 64)
FILE_KEYS = ("video", *(column for column in COLUMNS.values() if column != "reference_image"))


def read(output, metadata: str, keys=FILE_KEYS) -> UnifiedDataset:
    """As the Wan-Animate training script of DiffSynth opens a dataset."""
    square = ImageCropAndResize(512, 512, None, 16, 16)
    face = ToAbsolutePath(str(output)) >> LoadVideo(81, 4, 1, frame_processor=square)
    return UnifiedDataset(
        base_path=str(output),
        metadata_path=str(output / metadata),
        data_file_keys=keys,
        main_data_operator=UnifiedDataset.default_video_operator(
            base_path=str(output), max_pixels=1920 * 1080, height=HW[0], width=HW[1], num_frames=81
        ),
        special_operator_map={"animate_face_video": face},
    )


def frames(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rows = [clip_row(number, num_frames=9, hw=HW, caption=f'a "square", {number}\nmoves') for number in range(2)]
    return write_clips(tmp_path_factory.mktemp("diffsynth") / "clips", rows)


@pytest.mark.parametrize("metadata", ["csv", "json"])
def test_unified_dataset_gives_every_frame_and_the_captions(dataset, tmp_path, metadata):
    assert export_diffsynth(dataset, tmp_path / "out", metadata=metadata).written == 2
    found = read(tmp_path / "out", f"metadata.{metadata}")
    assert len(found) == 2
    for item, row in zip(found, store.load(dataset, CLIPS_SCHEMA)):
        clip = load_clip(row)
        grown = MaskGrowth()(clip.mask)
        assert item["prompt"] == row["caption"]
        assert psnr_db(frames(item["video"]), clip.frames_rgb) > 40
        assert psnr_db(frames(item["animate_pose_video"]), draw_poses(clip.pose_keypoints, HW)) > 40
        assert psnr_db(frames(item["animate_face_video"]), clip.faces_rgb) > 40
        assert (frames(item["animate_mask_video"]) == grown[..., None] * 255).all()
        background = np.where(grown[..., None], 0, clip.frames_rgb).astype(np.uint8)
        assert psnr_db(frames(item["animate_inpaint_video"]), background) > 40
        assert (tmp_path / "out" / item["reference_image"]).is_file()


def test_the_video_is_the_clips_own_bytes(dataset, tmp_path):
    export_diffsynth(dataset, tmp_path / "out", selection=Selection(clips=["square1"]))
    row = store.load(dataset, CLIPS_SCHEMA)[1]
    assert (tmp_path / "out/square1/video.mp4").read_bytes() == row["video"]["bytes"]


def test_the_metadata_lists_the_chosen_clips_and_grows(dataset, tmp_path):
    export_diffsynth(dataset, tmp_path / "out", selection=Selection(clips=["square1"]), metadata="json")
    assert [entry["video"] for entry in read_json(tmp_path)] == ["square1/video.mp4"]
    exported = export_diffsynth(dataset, tmp_path / "out", metadata="json")
    assert (exported.written, exported.kept) == (1, 1)
    assert [entry["video"] for entry in read_json(tmp_path)] == ["square0/video.mp4", "square1/video.mp4"]


def read_json(tmp_path) -> list[dict[str, str]]:
    return json.loads((tmp_path / "out/metadata.json").read_text())


@pytest.mark.parametrize("caption", ["", "NA", "null", "12"])
def test_a_caption_that_csv_would_lose_is_refused_and_survives_in_json(tmp_path, caption):
    """pandas, with which DiffSynth reads csv, gives nan for an empty cell, and training would embed the word nan."""
    rows = [clip_row(0, hw=HW, caption=caption), clip_row(1, hw=HW, caption="a square")]
    dataset = write_clips(tmp_path / "clips", rows if caption != "12" else rows[:1])
    with pytest.raises(ValueError, match=r"clip square0: the caption would not come back .*use --metadata json"):
        export_diffsynth(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_diffsynth(dataset, tmp_path / "out", metadata="json")
    assert read(tmp_path / "out", "metadata.json")[0]["prompt"] == caption


def test_driving_clips_are_nothing_to_train_on(tmp_path, capsys):
    rows = [clip_row(0, hw=HW), clip_row(1, hw=HW, purpose="drive", modes=["animation"])]
    dataset = write_clips(tmp_path / "clips", rows)
    export = ["export", str(dataset), "--layout=diffsynth", f"--output={tmp_path / 'out'}"]
    assert main(export) == 2
    assert "clip square1: made with --purpose drive" in capsys.readouterr().err
    assert main([*export, "--where", "purpose == train"]) == 0


def test_clips_of_one_kind_leave_together(tmp_path):
    plain = {"modes": ["animation"], "mask": None}
    dataset = write_clips(tmp_path / "clips", [clip_row(0, hw=HW), clip_row(1, hw=HW, **plain)])
    with pytest.raises(ValueError, match="some of the clips serve replacement and some do not"):
        export_diffsynth(dataset, tmp_path / "out")
    export_diffsynth(dataset, tmp_path / "out", selection=Selection(clips=["square1"]))
    header = (tmp_path / "out/metadata.csv").read_text().splitlines()[0]
    assert header == '"video","prompt","animate_pose_video","animate_face_video","reference_image"'
    assert not (tmp_path / "out/square1/src_mask.mp4").exists()


def test_clips_without_people_leave_with_video_and_prompt(tmp_path):
    plain = {name: value for name, value in clip_row(0, hw=HW).items() if name not in ANIMATE_COLUMNS}
    export_diffsynth(write_clips(tmp_path / "clips", [plain]), tmp_path / "out")
    item = read(tmp_path / "out", "metadata.csv", keys=("video",))[0]
    assert sorted(item) == ["prompt", "video"] and len(item["video"]) == 5
    assert [path.name for path in (tmp_path / "out/square0").iterdir()] == ["video.mp4"]
