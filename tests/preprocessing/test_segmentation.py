from pathlib import Path

import pytest
from small_runs import MODELS

from preprocessing.segmentation import check_kind, kind_of_segmenter, open_segmenter


def test_files_tell_which_segmenter_they_are_for(tmp_path):
    assert kind_of_segmenter(Path("sam2_hiera_large.pt")) == "sam2"
    assert kind_of_segmenter(tmp_path) == "transformers"
    assert kind_of_segmenter(Path("segmenter.onnx")) == "onnx"


def test_a_kind_may_be_named_in_place_of_a_file_that_is_known(tmp_path, monkeypatch):
    assert check_kind(Path("sam2"), tmp_path / "sam2_hiera_large.pt")
    assert not check_kind(MODELS.segmenter, tmp_path / "sam2_hiera_large.pt")
    assert not check_kind(None, None)
    monkeypatch.chdir(tmp_path)
    Path("sam2").mkdir()  # a folder of the user's, which is meant then
    assert not check_kind(Path("sam2"), None)


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        ("sam2", None, "--segmenter sam2: no file is known; give the file: an .onnx network, a SAM2"),
        ("transformers", "sam2.pt", r"--segmenter transformers: sam2\.pt is a segmenter of kind sam2; give the file"),
    ],
)
def test_a_kind_without_its_file_is_an_error(kind, found, message):
    with pytest.raises(ValueError, match=message):
        check_kind(Path(kind), found and Path(found))


@pytest.mark.parametrize(("kind", "content"), [("sam2", "onnx"), ("onnx", "text"), ("transformers", "nothing")])
def test_a_file_of_another_kind_is_refused(kind, content, tmp_path):
    path = tmp_path / "weights"
    if content == "onnx":
        path = MODELS.segmenter
    elif content == "text":
        path.write_text("no network")
    with pytest.raises(ValueError, match=r"not a SAM2 checkpoint|not a complete ONNX model|not a folder of a trans"):
        open_segmenter(kind, path)
