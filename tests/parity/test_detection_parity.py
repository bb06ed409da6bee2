import numpy as np
import pytest
from preprocess_goldens import arrays, full_hw, picture, rolled_frames, strided

from preprocessing.detection import decode_people, detector_input, select_person

INPUT_HW = full_hw(arrays("04_detector"), "input")


def test_network_input_matches_the_original():
    expected, stride = strided(arrays("04_detector"), "input")
    result = detector_input(picture("01_frame_rgb.png")[None], hw=INPUT_HW)[0]
    np.testing.assert_array_equal(result[:, ::stride, ::stride], expected)


@pytest.mark.parametrize("case", range(len(arrays("04_detector")["case"])))
def test_the_chosen_person_matches_the_original(case):
    golden = arrays("04_detector")
    frame_hw = tuple(int(size) for size in golden["shape_raw"])
    # The network gives more rows; those that were not recorded are 0, and nobody.
    rows = np.concatenate([golden["det_rows"][case], np.zeros((1, 6), np.float32)])
    box = select_person(decode_people(rows, frame_hw, input_hw=INPUT_HW), frame_hw)
    np.testing.assert_array_equal(box[:4], golden["bbox"][case][:4])
    assert box[4] == pytest.approx(golden["bbox"][case][4], abs=1e-6)  # float32 scores


def test_the_detector_sees_rgb():
    batch = detector_input(rolled_frames(), hw=INPUT_HW)
    # The recorded means were summed in float32, one by one over all pixels: 3 digits are left.
    expected = arrays("14_pose2d_e2e")["det_input_mean_per_channel"]
    np.testing.assert_allclose(batch.mean(axis=(2, 3)), expected, atol=2e-3)
