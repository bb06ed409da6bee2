"""Rows of a track that wait for its end, when its best reference is known; on disk where they are many."""

import pickle
import tempfile
from collections.abc import Iterator
from typing import Any

from preprocessing.references import References
from preprocessing.types import Float
from preprocessing.windows import Window

_BYTES_IN_MEMORY = 8 << 20


class TrackDrafts:
    """Everything that a track gives until it ends: rows without reference and pose, and what those need."""

    def __init__(self, num_frames: int) -> None:
        self.references = References(num_frames)
        self.keypoints: list[Float] = []
        """Key points (T, 133, 3) of its windows, kept where poses are retargeted: one fit serves the whole track."""
        self._file = tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY)  # noqa: SIM115  (lives with the track)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def add(self, window: Window, row: dict[str, Any]) -> None:
        """Put a row away."""
        pickle.dump((window, row), self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._num_rows += 1

    def take(self) -> Iterator[tuple[Window, dict[str, Any]]]:
        """Give every row back, in order, and let the file go."""
        with self._file:
            self._file.seek(0)
            for _ in range(self._num_rows):
                yield pickle.load(self._file)
