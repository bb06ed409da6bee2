import json
import re

import numpy as np
import pytest
from preprocess_goldens import GOLDENS, UPSTREAM, arrays, names, picture

from preprocessing.masks import blacken, block_augment, dilate
from preprocessing.prompts import key_frames, point_prompts
from preprocessing.video_segmenter import segmenter_chunks

GOLDEN = arrays("08_mask")
CASES = range(len(GOLDEN["params_k_iter_wlen_hlen"]))


def unpack(bits):
    height, width = (int(size) for size in GOLDEN["shape"])
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


def mask_of(case):
    """The mask that a case grew. Which one is not recorded; growing loses no pixel, so the result holds it."""
    dilated = unpack(GOLDEN["dilated"][case])
    held = [mask for name in ("mask", "mask_small") if not (~dilated & (mask := unpack(GOLDEN[name]))).any()]
    return max(held, key=np.sum)


@pytest.mark.parametrize("case", CASES)
def test_dilation_and_blocks_match_the_original(case):
    kernel_pixels, iterations, num_columns, num_rows = map(int, GOLDEN["params_k_iter_wlen_hlen"][case])
    dilated = dilate(mask_of(case)[None], kernel_pixels=kernel_pixels, iterations=iterations)[0]
    np.testing.assert_array_equal(dilated, unpack(GOLDEN["dilated"][case]))
    augmented = block_augment(dilated, num_columns=num_columns, num_rows=num_rows)
    np.testing.assert_array_equal(augmented, unpack(GOLDEN["augmented"][case]))


@pytest.mark.parametrize("path", names("08_bg_case*.png"))
def test_background_matches_the_original(path):
    mask = unpack(GOLDEN["augmented"][int(re.search(r"case(\d+)", path)[1])])
    np.testing.assert_array_equal(blacken(picture("01_frame_rgb.png")[None], mask[None])[0], picture(path))


def test_key_frames_match_the_original():
    for num_frames, expected in json.loads((GOLDENS / "12_sam_keyframes.json").read_text()).items():
        chunks = segmenter_chunks(int(num_frames))
        assert sum(len(chunk) for chunk in chunks) == expected["n_masks"]
        assert [len(chunk) for chunk in chunks] == [chunk["len"] for chunk in expected["chunks"]]
        assert [key_frames(len(chunk)) for chunk in chunks] == [
            chunk["key_frames"] for chunk in expected["chunks"]
        ]


@pytest.mark.parametrize("path", names("12_sam_points_*.npz"))
def test_point_prompts_match_the_original(metas, path):
    golden = arrays(path.removesuffix(".npz"))
    frames = key_frames(len(metas))
    np.testing.assert_array_equal(frames, golden["key_frames"])
    np.testing.assert_array_equal(np.stack(point_prompts(metas, frames, profile=UPSTREAM)), golden["points"])
    assert (golden["labels"] == 1).all()  # all on the person, as point_prompts promises
