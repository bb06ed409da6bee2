"""Every rank's logging in its own file."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_accel import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards. pytest adds handlers when a test begins, so each empties it itself."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs._EARLY.buffer.clear()
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("rank", [0, 3])
def test_file_has_everything_and_the_terminal_what_its_rank_shows(
    rank: int, root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    root.handlers[:] = []
    logs.start_logging()
    logging.getLogger("somewhere").info("before the folder is known")
    path = logs.log_to_file(tmp_path, rank)
    assert path == tmp_path / "logs" / f"rank-{rank}.log"
    logging.getLogger("somewhere").info("and after")
    logging.getLogger("somewhere").warning("careful")
    try:
        raise KeyError("lost")
    except KeyError as error:
        logs.log_failure(error)
    text, shown = path.read_text(), capsys.readouterr().err
    lines = [line.split(" ", 2)[2] for line in text.splitlines()[:4]]
    assert lines == [
        "INFO somewhere: before the folder is known", "INFO somewhere: and after", "WARNING somewhere: careful",
        "ERROR wan_accel: the run failed",
    ]  # fmt: skip
    assert "Traceback" in text and "KeyError: 'lost'" in text
    assert "careful" in shown and "Traceback" not in shown
    assert ("and after" in shown) == (rank == 0)


def test_a_second_run_goes_on_in_its_own_file(root: logging.Logger, tmp_path: Path) -> None:
    root.handlers[:] = []
    logs.start_logging()
    first = logs.log_to_file(tmp_path / "one", 0)
    logging.getLogger("a").info("first")
    second = logs.log_to_file(tmp_path / "two", 0)
    logging.getLogger("a").info("second")
    assert "second" not in first.read_text() and "first" not in second.read_text()
    assert "second" in second.read_text()
