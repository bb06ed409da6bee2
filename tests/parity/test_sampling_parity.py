import numpy as np
from preprocess_goldens import arrays

from preprocessing.video import sample_indices


def test_frame_indices_match_the_original():
    golden = arrays("10_fps")
    column = {str(name): i for i, name in enumerate(golden["columns"])}
    for row in golden["rows"]:
        num_frames, video_fps = int(row[column["frame_num"]]), float(row[column["video_fps"]])
        num_samples, offset = int(row[column["target_num"]]), int(row[column["offset_in_indices"]])
        indices = sample_indices(
            num_frames,
            video_fps=video_fps,
            target_fps=float(row[column["fps_arg"]]),
            duration_seconds=num_frames / video_fps,
        )
        np.testing.assert_array_equal(indices, golden["indices"][offset : offset + num_samples])
