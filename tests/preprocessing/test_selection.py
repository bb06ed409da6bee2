import pytest
from tiny_clips import clip_row, write_clips

from preprocessing.selection import Selection, select


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips: square0 to square3, whose face_size is 10, 20, 30 and unknown; the last is for driving."""
    rows = [clip_row(number, quality={"face_size": 10.0 * (number + 1)}) for number in range(3)]
    rows.append(clip_row(3, purpose="drive", modes=["animation"], caption="somebody and a ball"))
    return write_clips(tmp_path_factory.mktemp("selection") / "clips", rows)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("quality.face_size >= 20", [1, 2]),
        ("purpose == train and caption == 'a square moves, number 0'", [0, 2]),
        ("modes contains replacement", [0, 1, 2]),
        ("(fps < 2 or clip_id == square1) and num_frames == 5", [1]),
    ],
)
def test_where_chooses_by_columns(clips, where, expected):
    assert select(clips, Selection(where=where)) == expected


def test_nothing_chosen_is_an_error(clips):
    with pytest.raises(ValueError, match=r"none of the 4 clips is chosen \(--where fps > 100\)"):
        select(clips, Selection(where="fps > 100"))


def test_clips_are_chosen_by_name(clips):
    assert select(clips, Selection(clips=["square2", "square0"])) == [0, 2]
    with pytest.raises(ValueError, match="no clip is called square7; the first of 4 is square0"):
        select(clips, Selection(clips=["square2", "square7"]))


def test_a_sample_is_spread_over_what_is_chosen(clips):
    assert select(clips, Selection(sample=2)) == [0, 3]
    assert select(clips, Selection(sample=9)) == [0, 1, 2, 3]
    assert select(clips, Selection(sample=1, where="purpose == drive")) == [3]
    with pytest.raises(ValueError, match="--sample 0: give 1 or more"):
        select(clips, Selection(sample=0))
