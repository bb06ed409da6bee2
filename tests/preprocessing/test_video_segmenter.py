import cv2
import numpy as np
import pytest

from preprocessing.types import PROFILES, Person
from preprocessing.video_segmenter import VideoSegmenter, fill_small_holes, segmenter_chunks

UPSTREAM = PROFILES["upstream"]
NUM_FRAMES, HW = 24, (64, 96)


def twins() -> np.ndarray:
    """Two white squares that pass each other on black: which is which can only be told by following them."""
    frames = np.zeros((NUM_FRAMES, *HW, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[10:26, 4 + 3 * i : 20 + 3 * i] = 255
        frame[36:52, 76 - 3 * i : 92 - 3 * i] = 255
    return frames


def upper_square() -> Person:
    """The one above, with key points on it in the first frame only."""
    keypoints = np.zeros((NUM_FRAMES, 133, 3), np.float32)
    keypoints[..., :2] = 12, 18
    keypoints[0, :, 2] = 0.9
    boxes = np.full((NUM_FRAMES, 5), -1.0)
    boxes[0] = 4, 10, 20, 26, 0.9
    return Person(boxes_xyxys=boxes, keypoints=keypoints)


class Follower:
    """A propagator that needs no network: in every frame the region that overlaps most with the mask before."""

    def __init__(self):
        self.calls = []

    def __call__(self, frames_rgb, prompts, first_mask):
        self.calls.append((len(frames_rgb), [prompt.frame for prompt in prompts], first_mask is not None))
        masks = np.zeros(frames_rgb.shape[:3], bool)
        known = first_mask
        if known is None:
            x, y = prompts[0].points_xy[prompts[0].on_person][0].astype(int)
            regions = cv2.connectedComponents((frames_rgb[0, ..., 0] > 0).astype(np.uint8))[1]
            known = regions == regions[y, x]
        for i, frame in enumerate(frames_rgb):
            num, regions = cv2.connectedComponents((frame[..., 0] > 0).astype(np.uint8))
            known = max((regions == n for n in range(1, num)), key=lambda region: (region & known).sum())
            masks[i] = known
        return masks


def test_identity_is_carried_from_chunk_to_chunk():
    follower = Follower()
    frames = twins()
    masks = VideoSegmenter(follower, chunk_frames=6)(frames, upper_square())
    expected = frames[..., 0] > 0
    expected[:, 32:] = False
    np.testing.assert_array_equal(masks, expected)
    assert [call[2] for call in follower.calls] == [False, True, True, True, True]


def test_upstream_starts_anew_in_every_chunk():
    follower = Follower()
    person = upper_square()
    VideoSegmenter(follower, profile=UPSTREAM, chunk_frames=6)(twins(), person)
    assert follower.calls == [(6, [0, 1, 2, 3, 4, 5], False)] * 4


def test_a_clip_without_the_person_is_empty():
    nobody = Person(boxes_xyxys=np.full((NUM_FRAMES, 5), -1.0), keypoints=np.zeros((NUM_FRAMES, 133, 3), np.float32))
    follower = Follower()
    assert not VideoSegmenter(follower)(twins(), nobody).any()
    assert follower.calls == []


def test_time_in_the_network_is_counted():
    segmenter = VideoSegmenter(Follower())
    segmenter(twins(), upper_square())
    assert segmenter.seconds_in_network > 0


@pytest.mark.parametrize(("num_frames", "chunk_frames"), [(1, 6), (6, 6), (7, 6), (24, 6), (25, 7), (401, 400)])
def test_chunks_share_one_frame_and_leave_none_out(num_frames, chunk_frames):
    chunks = segmenter_chunks(num_frames, chunk_frames=chunk_frames, overlap=1)
    assert sorted({frame for chunk in chunks for frame in chunk}) == list(range(num_frames))
    assert all(before.stop - 1 == after.start for before, after in zip(chunks, chunks[1:]))
    assert all(1 < len(chunk) <= chunk_frames for chunk in chunks) or num_frames == 1


def test_chunks_that_cannot_hand_on_are_refused():
    with pytest.raises(ValueError, match="chunks of 1 frames cannot hand anything on: give 2 or more"):
        VideoSegmenter(Follower(), chunk_frames=1)


def test_small_holes_are_filled_and_large_ones_are_not():
    scores = np.full((20, 30), 2.0, np.float32)
    scores[2:4, 2:6] = -1  # 8 cells
    scores[10:13, 10:13] = -1  # 9 cells
    filled = fill_small_holes(scores)
    assert (filled[2:4, 2:6] > 0).all()
    np.testing.assert_array_equal(filled[10:13, 10:13], -1)
    np.testing.assert_array_equal(filled[scores > 0], 2)
