import numpy as np
import pytest
from preprocess_goldens import arrays, picture

from preprocessing.detection import decode_people, detector_input, select_person


def test_network_input_matches_the_original():
    golden = arrays("04_detector")
    result = detector_input(picture("01_frame_rgb.png")[None])[0]
    np.testing.assert_array_equal(result[:, ::16, ::16], golden["input_stride16"])


@pytest.mark.parametrize("case", range(len(arrays("04_detector")["case"])))
def test_the_chosen_person_matches_the_original(case):
    golden = arrays("04_detector")
    frame_hw = tuple(int(size) for size in golden["shape_raw"])
    rows = np.zeros((300, 6), np.float32)
    rows[: golden["det_rows"].shape[1]] = golden["det_rows"][case]
    box = select_person(decode_people(rows, frame_hw), frame_hw)
    np.testing.assert_allclose(box, golden["bbox"][case], rtol=0, atol=1e-7)  # float32 scores


def test_the_detector_sees_rgb():
    golden = arrays("14_pose2d_e2e")
    frame = picture("01_frame_rgb.png")
    batch = detector_input(np.stack([np.roll(frame, roll, axis=1) for roll in golden["roll"]]))
    # The recorded means were summed in float32, one by one over 400,000 values: 3 digits are left.
    np.testing.assert_allclose(batch.mean(axis=(2, 3)), golden["det_input_mean_per_channel"], atol=2e-3)
