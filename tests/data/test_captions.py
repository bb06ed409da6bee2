"""Captions from a file of any format, and files that cannot be used."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wan_accel.data.captions import check_clip_ids, read_captions

# U+2028 (line separator) and U+0085 end a line for `str.splitlines`, but in none of these formats.
ENDINGS = "not\u2028the\x85end"
EXPECTED = {"a-1": "a man, walking", "b-2": "视频\nof two lines", "c-3": "", "d-4": ENDINGS}
ROWS = [{"clip_id": name, "caption": caption} for name, caption in EXPECTED.items()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_format_reads_the_same(tmp_path: Path, encoding: str) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS) + "\n"
    rows = f'clip_id,caption\na-1,"a man, walking"\nb-2,"视频\nof two lines"\nc-3,\nd-4,{ENDINGS}\n'
    texts = {
        "a.jsonl": lines, "rows.json": json.dumps(ROWS), "map.json": json.dumps(EXPECTED), "a.csv": rows,
        "windows.jsonl": lines.replace("\n", "\r\n"),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    pq.write_table(pa.Table.from_pylist([row | {"more": 1} for row in ROWS]), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read_captions(path) == EXPECTED, path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"is not a file of captions: give one of \.jsonl, \.json, \.csv, \.parquet"),
        ("none.jsonl", None, "does not exist: give a file with clip_id and caption"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.parquet", "x", "cannot be read"),
        ("a.json", '{"a": "x", "b": "y", "a": "z"}', r"a\.json cannot be read \(a is there twice: keep one\)"),
        ("a.jsonl", '{"clip_id": "a", "caption": "b", "caption": "c"}', r"\(caption is there twice: keep one\)"),
        ("a.json", "3", "holds neither a list of rows nor a map"),
        ("a.jsonl", '{"clip_id": "a", "text": "b"}', "row 1 has no text clip_id and caption, it is {'clip_id': 'a'"),
        ("a.csv", f"clip_id,caption\na,{'x' * 200_000}\n", r"cannot be read \(field larger than field limit"),
        ("a.csv", "id,caption\n1,x\n", "row 1 has no text clip_id and caption"),
        ("a.jsonl", '{"clip_id": "a", "caption": "b"}\n{"clip_id": "a", "caption": "c"}', r"a has two .* \(row 2\)"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_captions_of_unknown_clips(caplog: pytest.LogCaptureFixture) -> None:
    check_clip_ids(EXPECTED, [*EXPECTED, "e-5"], "file")
    assert not caplog.records
    check_clip_ids(EXPECTED, ["a-1", "d-4"], "file")
    assert "data.captions=file has captions of 2 clips that the dataset does not have (b-2, c-3): are" in caplog.text
    with pytest.raises(ValueError, match=r"captions of 4 clips .* \(a-1, b-2, c-3 and 1 more\), and none of a clip"):
        check_clip_ids(EXPECTED, ["e-5"], "file")
