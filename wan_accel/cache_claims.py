"""Work that processes share out by files in a folder, without talking to each other. Torch-free."""

import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from wan_accel.data.store import StoreError


class Claims:
    """The numbers 0, 1, ... of a list that all processes have, each handed to one of them.

    They are taken in order, by a file each that `O_EXCL` gives to one process, so those that are taken are always the
    first ones: a process that comes back looks for their end in steps that double, about 2 log2(taken meanwhile) looks,
    and never lists the folder.

    Args:
        folder: where the files are, empty at first.
        kind: what is shared out, a part of the files' names.
        total: length of the list.
    """

    def __init__(self, folder: Path, kind: str, total: int) -> None:
        self._folder = folder
        self._kind = kind
        self._total = total

    def __iter__(self) -> Iterator[int]:
        """The numbers that this process gets.

        Raises:
            StoreError: the folder is gone.
        """
        number = 0
        while (number := self._first_free(number)) < self._total:
            if self._take(number):
                yield number
            number += 1

    def _take(self, number: int) -> bool:
        try:
            os.close(os.open(self._path(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise StoreError(
                f"{self._folder} is gone: another run removed it, or somebody did; what is encoded is kept, start again"
            ) from None
        return True

    def _first_free(self, number: int) -> int:
        """The first number from this one on that nobody had taken a moment ago, or the total."""
        taken, step = number - 1, 1
        while (high := taken + step) < self._total and self._path(high).exists():
            taken, step = high, 2 * step
        between = range(taken + 1, min(high, self._total))
        return between.start + bisect_left(between, True, key=lambda one: not self._path(one).exists())

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._kind}-{number}"
