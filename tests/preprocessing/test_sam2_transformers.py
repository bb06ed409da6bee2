"""transformers' SAM2 with random weights, small: the frames, prompts and memories are real, the masks mean nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)

from preprocessing.prompts import FramePrompt
from preprocessing.sam2_transformers import Sam2TransformersPropagator
from preprocessing.segmentation import open_segmenter
from preprocessing.video_segmenter import VideoSegmenter, fill_small_holes

SIDE = 128
NUM_FRAMES, HW = 5, (96, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A SAM2 tiny at a side of 128, with weights moved so far that masks are neither empty nor full."""
    cells = [[SIDE // stride] * 2 for stride in (4, 8, 16)]
    config = Sam2VideoConfig(
        image_size=SIDE, memory_attention_rope_feat_sizes=cells[-1], prompt_encoder_config={"image_size": SIDE},
        vision_config={"backbone_feature_sizes": cells, "backbone_config": Sam2HieraDetConfig(image_size=[SIDE, SIDE])},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Sam2VideoModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
            if name.startswith(("memory_attention", "memory_encoder")) and parameter.ndim > 1:
                parameter.mul_(3)  # initial weights are so small that memories change nothing
            if "output_hypernetworks_mlps" in name and name.endswith("proj_out.weight"):
                parameter.mul_(50)
            if name.endswith("pred_obj_score_head.proj_out.bias"):
                parameter.fill_(5.0)
    path = tmp_path_factory.mktemp("sam2") / "tiny"
    model.save_pretrained(path)
    size = {"height": SIDE, "width": SIDE}
    Sam2VideoProcessor(
        Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size), target_size=SIDE
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def propagator(folder):
    return Sam2TransformersPropagator(folder)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    colors = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, HW[0] // 8, HW[1] // 8, 3)).astype(np.uint8)
    return colors.repeat(8, 1).repeat(8, 2)


PROMPT = FramePrompt(
    frame=2, points_xy=np.array([[30.0, 40.0], [5.0, 5.0]]), on_person=np.array([True, False]),
    box_xyxy=np.array([10.0, 10, 50, 80]),
)  # fmt: skip


def test_frames_in_memory_give_what_transformers_own_session_gives(folder, propagator, frames):
    ours = propagator(frames, [PROMPT], None)
    processor, model = Sam2VideoProcessor.from_pretrained(folder), Sam2VideoModel.from_pretrained(folder).eval()
    theirs = np.zeros_like(ours)
    with torch.inference_mode():
        session = processor.init_video_session(video=list(frames), inference_device="cpu", dtype=torch.float32)
        processor.add_inputs_to_inference_session(
            session, frame_idx=2, obj_ids=1, input_points=[[[[30, 40], [5, 5]]]], input_labels=[[[1, 0]]],
            input_boxes=[[[10, 10, 50, 80]]],
        )  # fmt: skip
        model(session, frame_idx=2)
        for reverse in (False, True):
            for output in model.propagate_in_video_iterator(session, start_frame_idx=2, reverse=reverse):
                filled = torch.from_numpy(fill_small_holes(output.pred_masks[0, 0].numpy()))[None, None]
                (mask,) = processor.post_process_masks([filled], [HW], binarize=True)
                theirs[output.frame_idx] = mask[0, 0].numpy()
    assert 0.05 < theirs.mean() < 0.95  # something to compare
    np.testing.assert_array_equal(ours, theirs)


def test_a_known_first_mask_stays_and_decides_what_follows(propagator, frames):
    results = []
    for x in (5, 35):
        mask = np.zeros(HW, bool)
        mask[20:80, x : x + 25] = True
        results.append(propagator(frames, [], mask))
        assert (results[-1][0] == mask).mean() > 0.95  # it went through the network's own resolution
    assert (results[0][1:] != results[1][1:]).any()


def test_points_on_others_change_the_mask(propagator, frames):
    alone = FramePrompt(
        frame=2, points_xy=PROMPT.points_xy[:1], on_person=PROMPT.on_person[:1], box_xyxy=PROMPT.box_xyxy
    )
    assert (propagator(frames, [alone], None) != propagator(frames, [PROMPT], None)).any()


def test_a_folder_without_all_weights_is_refused(folder, tmp_path):
    """transformers itself fills the gap with random numbers."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["no_object_pointer"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of a Sam2VideoModel, no_object_pointer"):
        Sam2TransformersPropagator(tmp_path)


@pytest.mark.parametrize("config", [None, {"model_type": "bert"}], ids=["empty", "another model"])
def test_other_folders_are_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a folder of a transformers Sam2VideoModel"):
        Sam2TransformersPropagator(tmp_path)


def test_the_segmenter_is_opened_by_its_folder(folder):
    assert isinstance(open_segmenter("transformers", folder), VideoSegmenter)
