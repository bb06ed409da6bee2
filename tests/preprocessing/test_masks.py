import numpy as np
import pytest

from preprocessing.masks import blacken, block_augment, dilate


def mask_of(*boxes, hw=(40, 60)):
    mask = np.zeros(hw, bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def test_dilation_grows_by_half_the_kernel_a_time():
    mask = mask_of((20, 20, 21, 21))
    np.testing.assert_array_equal(dilate(mask[None], kernel_pixels=3, iterations=4)[0], mask_of((16, 16, 25, 25)))
    np.testing.assert_array_equal(dilate(mask[None], kernel_pixels=7, iterations=0)[0], mask)


def test_one_block_is_the_bounding_box():
    mask = mask_of((10, 5, 11, 30), (30, 29, 41, 30))
    result = block_augment(mask, num_columns=1, num_rows=1)
    np.testing.assert_array_equal(result, mask_of((10, 5, 40, 29)) | mask)


def test_only_cells_with_a_person_are_filled():
    mask = mask_of((0, 0, 1, 1), (20, 20, 21, 21))
    result = block_augment(mask, num_columns=2, num_rows=2)
    np.testing.assert_array_equal(result, mask_of((0, 0, 10, 10)) | mask)


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 6, 6), (5, 5, 7, 30), (0, 0, 60, 1)])
def test_empty_and_narrow_masks_survive_augmentation(box):
    mask = mask_of(box)
    result = block_augment(mask, num_columns=10, num_rows=20)
    assert (result >= mask).all()
    assert result.any() == mask.any()
    extent = [np.ptp(np.flatnonzero(m.any(axis=0))) if m.any() else 0 for m in (mask, result)]
    assert extent[0] == extent[1]


def test_augmentation_leaves_its_input_alone():
    mask = mask_of((10, 5, 11, 30), (30, 29, 41, 30))
    before = mask.copy()
    block_augment(mask, num_columns=1, num_rows=1)
    np.testing.assert_array_equal(mask, before)


def test_background_is_black_where_the_person_was():
    frames = np.full((1, 40, 60, 3), 7, np.uint8)
    result = blacken(frames, mask_of((10, 10, 20, 20))[None])
    assert result.dtype == np.uint8
    assert result[0, 10:20, 10:20].max() == 0
    assert result.sum() == 7 * 3 * (40 * 60 - 100)
