import pytest
from tiny_clips import clip_row, write_clips

from preprocessing.selection import Selection, select
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips: square0 to square3, whose face_size is 10, 20, 30 and unknown; the last is for driving."""
    rows = [clip_row(number, quality={"face_size": 10.0 * (number + 1)}) for number in range(3)]
    rows.append(clip_row(3, purpose="drive", modes=["animation"], caption="somebody and a ball"))
    root = write_clips(tmp_path_factory.mktemp("selection") / "clips", rows)
    return store.load(root, CLIPS_SCHEMA)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("quality.face_size >= 20", [1, 2]),
        ("quality.face_size>=20 and quality.face_size<30", [1]),
        ("quality.face_size != 20", [0, 2]),
        ("purpose == train and caption == 'a square moves, number 0'", [0, 2]),
        ("purpose != 'train'", [3]),
        ("modes == replacement", [0, 1, 2]),
        ("source.track <= 0 and num_frames == 5", [0, 1, 2, 3]),
        ("clip_id > square1", [2, 3]),
        ("(fps < 2 or clip_id == square1) and num_frames == 5", [1]),
        ("caption == 'somebody and a ball' and fps == 16", [3]),
    ],
)
def test_where_chooses_by_columns(clips, where, expected):
    assert select(clips, Selection(where=where)) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("face_size > 3", "there is no such column; use schema, clip_id, source, "),
        ("quality.size > 3", r"quality has no size; use quality\.mean_keypoint_score, "),
        ("quality > 3", r"name one of its parts, such as quality\.mean_keypoint_score"),
        ("mask == 1", "there is no such column"),
        ("fps >> 3", "`fps >> 3` is no condition"),
        ("fps = 3", "'fps = 3' is no condition: write COLUMN == VALUE"),
        ("fps > fast", "fps: it holds numbers, and 'fast' is none"),
        ("caption > 3", "caption: it holds texts, and 3 is none"),
        ("fps > 1 and", "is no condition"),
        ("1 < fps < 3", "`1 < fps < 3` is no condition"),
        ("print('x') == 3", r"print\('x'\): there is no such column"),
        ("fps == print()", r"`fps == print\(\)` is no condition"),
        ("fps > 100", r"none of the 4 clips is chosen \(--where fps > 100\)"),
    ],
)
def test_a_condition_that_cannot_be_used_is_explained(clips, where, message):
    with pytest.raises(ValueError, match=message):
        select(clips, Selection(where=where))


def test_clips_are_chosen_by_name(clips):
    assert select(clips, Selection(clips=["square2", "square0"])) == [0, 2]
    with pytest.raises(ValueError, match="no clip is called square7; the first of 4 is square0"):
        select(clips, Selection(clips=["square2", "square7"]))


def test_a_sample_is_the_same_each_time_and_drawn_from_what_is_chosen(clips):
    drawn = select(clips, Selection(sample=2))
    assert len(drawn) == 2 and drawn == select(clips, Selection(sample=2)) == sorted(drawn)
    assert select(clips, Selection(sample=9)) == [0, 1, 2, 3]
    assert select(clips, Selection(sample=1, where="purpose == drive")) == [3]
    with pytest.raises(ValueError, match="--sample 0: give 1 or more"):
        select(clips, Selection(sample=0))
