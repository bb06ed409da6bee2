import pyarrow as pa
import pytest

from wan_accel.data.where import parse_where

TABLE = pa.table(
    {
        "quality.hand_score": pa.array([0.1, 0.5, None, 0.3], pa.float32()),
        "source.path": ["a/Walk.mp4", "b and c.mp4", "walk_2.mp4", None],
        "num_frames": pa.array([5, 9, 13, 17], pa.int32()),
    }
)
COLUMNS = dict(zip(TABLE.schema.names, TABLE.schema.types))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quality.hand_score < 0.3", [5]),
        ("quality.hand_score <= 0.3", [5, 17]),  # 0.3 of the column's own precision
        ("quality.hand_score = 0.1", [5]),
        ("quality.hand_score == .1", [5]),
        ("num_frames!=9", [5, 13, 17]),
        ("num_frames > 8.5 and num_frames < 1.4e1", [9, 13]),
        ("source.path contains walk", [5, 13]),
        ("source.path contains 'b and'", [9]),
        ('source.path = "walk_2.mp4"', [13]),
        ("source.path contains .*", []),  # a piece of text, no pattern
        ("quality.hand_score is missing", [13]),
        ("quality.hand_score IS NOT missing AND source.path is missing", [17]),
        ("num_frames = 5 or num_frames = 9 and quality.hand_score > 0.9", [5]),
        ("(num_frames = 5 or num_frames = 9) and quality.hand_score > 0.4", [9]),
        ("not num_frames = 5 and not (num_frames = 9)", [13, 17]),
        ("not quality.hand_score < 0.3", [9, 17]),  # what is missing answers nothing
        ("quality.hand_score < 0.3 or source.path contains walk", [5, 13]),
        ("quality.hand_score < 0.3 and source.path contains walk", [5]),
    ],
)
def test_expressions_choose_rows(text, expected):
    assert TABLE.filter(parse_where(text, COLUMNS))["num_frames"].to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quality.hand_scor < 1", r"a clip has no quality.hand_scor: did you mean quality.hand_score\? There are qual"),
        ("quality.hand_score <", "'quality.hand_score <' ends too early: write comparisons"),
        ("", "'' ends too early"),
        ("num_frames = 5 num_frames = 9", "stops making sense at 'num_frames = 9'"),
        ("num_frames = 5 and", "stops making sense at 'and'"),
        ("num_frames contains 3", "num_frames is a number, it cannot contain '3'"),
        ("num_frames < abc", "num_frames is a number, 'abc' is none"),
        ("num_frames < nan", "num_frames is a number, 'nan' is none"),
        ("__import__('os').system('true')", "stops making sense at"),
        ("num_frames.__class__ = 3", "a clip has no num_frames.__class__"),
        ("(" * 5000 + "num_frames = 5" + ")" * 5000, "too many parentheses"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_where(text, COLUMNS)


def test_error_names_the_option():
    with pytest.raises(ValueError, match=r"^data\.where: a clip has no fbs: did you mean"):
        parse_where("fbs > 3", {"fps": pa.float64()}, option="data.where")
