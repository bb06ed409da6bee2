"""SAM2 with random weights in the released layout: frames, prompts and memories are real, the masks mean nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor
from small_runs import MODELS, part_of, process, settings

from preprocessing.pipeline import Pipeline
from preprocessing.prompts import FramePrompt
from preprocessing.sam2_video import Sam2Propagator
from preprocessing.settings import ModelFiles, Runtime
from preprocessing.video_segmenter import VideoSegmenter
from wan_accel.data.schema import unpack_mask

IMAGE_PIXELS = 128
NUM_FRAMES, HW = 6, (96, 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """SAM 2.0 tiny with random weights, moved so far that masks are neither empty nor full."""
    torch.manual_seed(0)
    model = build_sam2_video_predictor("configs/sam2/sam2_hiera_t.yaml", None, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
        decoder = model.sam_mask_decoder
        decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
        for network in decoder.output_hypernetworks_mlps:
            network.layers[-1].weight.mul_(50)
    path = tmp_path_factory.mktemp("sam2") / "tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def propagator(checkpoint):
    return Sam2Propagator(checkpoint, image_pixels=IMAGE_PIXELS)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> Path:
    """A folder of frames, the only thing besides a video file that the package's own loader reads."""
    folder = tmp_path_factory.mktemp("frames")
    colors = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, HW[0] // 8, HW[1] // 8, 3)).astype(np.uint8)
    for number, color in enumerate(colors):
        Image.fromarray(color.repeat(8, 0).repeat(8, 1)).save(folder / f"{number:05}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def frames(jpegs) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(jpegs.glob("*.jpg"))])


def prompt(frame: int, *, box=(10, 10, 50, 80)) -> FramePrompt:
    return FramePrompt(
        frame=frame, points_xy=np.array([[30.0, 40.0], [5.0, 5.0]]), on_person=np.array([True, False]),
        box_xyxy=None if box is None else np.array(box, float),
    )  # fmt: skip


@pytest.mark.parametrize("box", [(10, 10, 50, 80), None], ids=["points and box", "points"])
def test_frames_in_memory_give_what_the_packages_own_loader_gives(propagator, jpegs, frames, box):
    ours = propagator(frames, [prompt(2, box=box)], None)
    predictor = propagator._predictor
    theirs = np.zeros_like(ours)
    with torch.inference_mode():
        state = predictor.init_state(str(jpegs))
        predictor.add_new_points_or_box(
            state, 2, 1, points=np.float32([[30, 40], [5, 5]]), labels=np.int32([1, 0]),
            box=None if box is None else np.float32(box),
        )  # fmt: skip
        for reverse in (False, True):
            for frame, _, scores in predictor.propagate_in_video(state, start_frame_idx=2, reverse=reverse):
                theirs[frame] = (scores[0, 0] > 0).numpy()
    assert 0.05 < theirs.mean() < 0.95  # something to compare
    np.testing.assert_array_equal(ours, theirs)


def test_a_known_first_mask_stays_and_decides_what_follows(propagator, frames):
    results = []
    for x in (5, 35):
        mask = np.zeros(HW, bool)
        mask[20:80, x : x + 25] = True
        results.append(propagator(frames, [], mask))
        assert (results[-1][0] == mask).mean() > 0.98  # it went through the network's own resolution
    assert (results[0][1:] != results[1][1:]).any()


def test_points_on_others_change_the_mask(propagator, frames):
    alone = FramePrompt(
        frame=0, points_xy=np.array([[30.0, 40.0]]), on_person=np.array([True]), box_xyxy=np.array([10.0, 10, 50, 80])
    )
    assert (propagator(frames, [alone], None) != propagator(frames, [prompt(0)], None)).any()


def test_the_original_size_is_told_by_the_weights(checkpoint, tmp_path):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    weights["image_encoder.trunk.patch_embed.proj.weight"] = torch.zeros(100, 3, 7, 7)
    torch.save({"model": weights}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: a SAM2 of 12 blocks of width 100 is none of those released"):
        Sam2Propagator(tmp_path / "odd.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", {"state": {}}], ids=["empty", "text", "other"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt: not a SAM2 checkpoint"):
        Sam2Propagator(path)


def test_decord_is_left_alone(checkpoint):
    """The package's video loader sets decord's bridge for the whole process, which breaks other readers."""
    script = (
        "import sys, pathlib, numpy as np\n"
        "from preprocessing.sam2_video import Sam2Propagator\n"
        "from preprocessing.prompts import FramePrompt\n"
        f"run = Sam2Propagator(pathlib.Path({str(checkpoint)!r}), image_pixels={IMAGE_PIXELS})\n"
        "prompt = FramePrompt(frame=0, points_xy=np.ones((1, 2)), on_person=np.ones(1, bool), box_xyxy=None)\n"
        "run(np.zeros((2, 32, 32, 3), np.uint8), [prompt], None)\n"
        "assert 'decord' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_pipeline_stores_its_masks(checkpoint, tmp_path):
    video = part_of("walker.mp4", tmp_path / "walker.mp4", range(13))
    models = ModelFiles(detector=MODELS.detector, pose=MODELS.pose, segmenter=checkpoint)
    # The released side of 1024 takes a minute a clip here.
    made = Pipeline(settings(segmenter="sam2", quality={}), models, runtime=Runtime(num_threads=2))
    made.networks.segmenter = VideoSegmenter(Sam2Propagator(checkpoint, image_pixels=IMAGE_PIXELS))
    (row,) = process(made, video)
    mask = unpack_mask(row["mask"], (row["num_frames"], row["height"], row["width"]))
    assert 0.01 < mask.mean() < 0.99
    assert mask.any(axis=(1, 2)).all()


def test_two_people_are_prompted_apart(checkpoint, tmp_path):
    """Frames of the demo with both people: the other one's box ends up as points that are not meant."""
    seen = []

    def spy(frames_rgb, prompts, first_mask):
        seen.extend(prompts)
        return np.ones(frames_rgb.shape[:3], bool)

    video = part_of("two_people.mp4", tmp_path / "two.mp4", range(40, 60))
    made = Pipeline(settings(people="all", area=640 * 526, quality={}), MODELS, runtime=Runtime(num_threads=2))
    made.networks.segmenter = VideoSegmenter(spy)
    rows = process(made, video)
    assert {row["source"]["track"] for row in rows} == {0, 1}
    assert all((~one.on_person).sum() > 0 and one.box_xyxy is not None for one in seen)
    for one in seen:
        inside = (one.points_xy >= one.box_xyxy[:2]) & (one.points_xy <= one.box_xyxy[2:])
        assert not inside.all(axis=1)[~one.on_person].any()
