import json

import numpy as np
import pytest
from preprocess_goldens import GOLDENS, UPSTREAM, arrays, picture

from preprocessing.masks import blacken, block_augment, dilate, key_frames, point_prompts, segmenter_chunks

GOLDEN = arrays("08_mask")
CASES = range(len(GOLDEN["params_k_iter_wlen_hlen"]))
SMALL_MASK_CASE = 5


def unpack(bits):
    height, width = (int(size) for size in GOLDEN["shape"])
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


@pytest.mark.parametrize("case", CASES)
def test_dilation_and_blocks_match_the_original(case):
    kernel_pixels, iterations, num_columns, num_rows = map(int, GOLDEN["params_k_iter_wlen_hlen"][case])
    mask = unpack(GOLDEN["mask_small" if case == SMALL_MASK_CASE else "mask"])
    dilated = dilate(mask[None], kernel_pixels=kernel_pixels, iterations=iterations)[0]
    np.testing.assert_array_equal(dilated, unpack(GOLDEN["dilated"][case]))
    augmented = block_augment(dilated, num_columns=num_columns, num_rows=num_rows)
    np.testing.assert_array_equal(augmented, unpack(GOLDEN["augmented"][case]))


def test_background_matches_the_original():
    frame, mask = picture("01_frame_rgb.png"), unpack(GOLDEN["augmented"][1])
    np.testing.assert_array_equal(blacken(frame[None], mask[None])[0], picture("08_bg_case1.png"))


def test_key_frames_match_the_original():
    for num_frames, expected in json.loads((GOLDENS / "12_sam_keyframes.json").read_text()).items():
        chunks = segmenter_chunks(int(num_frames))
        assert sum(len(chunk) for chunk in chunks) == expected["n_masks"]
        assert [len(chunk) for chunk in chunks] == [chunk["len"] for chunk in expected["chunks"]]
        assert [key_frames(len(chunk)) for chunk in chunks] == [
            chunk["key_frames"] for chunk in expected["chunks"]
        ]


def test_point_prompts_match_the_original(metas):
    golden = arrays("12_sam_points_n24")
    frames = key_frames(len(metas))
    np.testing.assert_array_equal(frames, golden["key_frames"])
    np.testing.assert_array_equal(np.stack(point_prompts(metas, frames, profile=UPSTREAM)), golden["points"])
    assert (golden["labels"] == 1).all()  # all on the person, as point_prompts promises
