import numpy as np
import pytest
from preprocess_goldens import arrays

from preprocessing.video import sample_indices

GOLDEN = arrays("10_fps")
ROWS = [dict(zip(map(str, GOLDEN["columns"]), row)) for row in GOLDEN["rows"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(f"{value:g}" for value in row.values()))
def test_frame_indices_match_the_original(row):
    num_frames, video_fps = int(row["frame_num"]), float(row["video_fps"])
    indices = sample_indices(
        num_frames,
        video_fps=video_fps,
        target_fps=float(row["fps_arg"]),
        duration_seconds=num_frames / video_fps,
    )
    offset = int(row["offset_in_indices"])
    np.testing.assert_array_equal(indices, GOLDEN["indices"][offset : offset + int(row["target_num"])])
