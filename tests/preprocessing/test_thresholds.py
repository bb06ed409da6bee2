import pytest

from preprocessing.thresholds import Bound, load_bounds, violation


def test_the_shipped_bounds_load():
    bounds = load_bounds(None)
    assert bounds["track_switches"] == Bound(max=0)
    assert bounds["mean_keypoint_score"].min == 0.3


def test_a_file_replaces_them(tmp_path):
    path = tmp_path / "quality.yaml"
    path.write_text("hand_score: {min: 0.5}\nmotion: {min: 0.001, max: 0.5}\n")
    assert load_bounds(path) == {"hand_score": Bound(min=0.5), "motion": Bound(min=0.001, max=0.5)}
    path.write_text("")
    assert load_bounds(path) == {}


def test_all_problems_of_a_file_come_at_once(tmp_path):
    path = tmp_path / "quality.yaml"
    path.write_text("hands: {min: 1}\nblur: {least: 3}\nmotion: {min: fast}\n")
    with pytest.raises(
        ValueError,
        match=r"'hands' is no figure of a clip: use mean_keypoint.*; blur: give .*; motion.min: 'fast' is not a number",
    ):
        load_bounds(path)
    path.write_text("[")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        load_bounds(path)
    with pytest.raises(ValueError, match=r"cannot be read as YAML .*No such file"):
        load_bounds(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ({"hand_score": 0.5, "blur": 100.0}, None),
        ({"hand_score": 0.4999, "blur": 100.0}, ("hand_score", "hand_score is 0.4999, at least 0.5 is asked for")),
        ({"hand_score": 0.9, "blur": 301.0}, ("blur", "blur is 301, at least 50 and at most 300 is asked for")),
        ({"hand_score": None, "blur": 100.0}, ("hand_score", "hand_score was not measured, at least 0.5 is asked for")),
    ],
)
def test_the_first_figure_outside_its_bound_is_named(quality, expected):
    assert violation(quality, {"hand_score": Bound(min=0.5), "blur": Bound(min=50, max=300)}) == expected


def test_a_figure_that_was_not_measured_violates_no_maximum():
    assert violation({"track_switches": None}, {"track_switches": Bound(max=0)}) is None
