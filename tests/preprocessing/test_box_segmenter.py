from pathlib import Path

import numpy as np
import pytest

from preprocessing.box_segmenter import BoxSegmenter
from preprocessing.detection import select_person
from preprocessing.networks import open_detector, open_pose
from preprocessing.pose import pose62
from preprocessing.types import Person
from preprocessing.video import decode_frames
from wan_accel.data.skeleton import BODY

DEMO = Path(__file__).parents[2] / "demo"


def people_of(boxes, keypoints=None):
    return Person(boxes_xyxys=np.asarray(boxes, float), keypoints=keypoints)


@pytest.mark.parametrize(("video", "covered"), [("walker.mp4", 0.85), ("jumping.mp4", 0.65)])
def test_the_segmenter_covers_the_person(video, covered):
    frames = decode_frames(DEMO / "videos" / video, range(0, 90, 30)).frames_rgb
    hw = frames.shape[1:3]
    found = open_detector(DEMO / "models/person_detector.onnx").people(frames)
    boxes = np.stack([select_person(people, hw) for people in found])
    keypoints = open_pose(DEMO / "models/wholebody133.onnx")(frames, boxes).keypoints
    masks = BoxSegmenter(DEMO / "models/person_segmenter.onnx")(frames, people_of(boxes))
    assert masks.shape == frames.shape[:3]
    pose = pose62(keypoints, hw)[:, BODY]
    hits = [
        mask[int(y), int(x)]
        for mask, points in zip(masks, pose)
        for x, y, _ in points[np.isfinite(points[:, 0])]
        if 0 <= x < mask.shape[1] and 0 <= y < mask.shape[0]
    ]
    assert np.mean(hits) >= covered
    for mask, (x1, y1, x2, y2, _) in zip(masks, boxes.astype(int)):
        assert mask[y1:y2, x1:x2].sum() > 0.85 * mask.sum()
        assert 0.2 < mask[y1:y2, x1:x2].mean() < 0.9


def test_the_segmenter_leaves_frames_without_a_person_empty():
    segmenter = BoxSegmenter(DEMO / "models/person_segmenter.onnx")
    frames = decode_frames(DEMO / "videos/walker.mp4", [0, 1]).frames_rgb
    masks = segmenter(frames, people_of([[0, 0, 480, 832, -1], [73, 180, 386, 748, 0.7]]))
    assert not masks[0].any()
    assert masks[1].any()


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"a person segmenter has input \(N, S, S, 3\)"):
        BoxSegmenter(DEMO / "models/wholebody133.onnx")
