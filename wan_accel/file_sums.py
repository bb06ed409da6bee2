"""Sizes and checksums of a checkpoint's files: taken while they are written, compared afterwards."""

import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

_CHUNK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file's content is known by. It finds damage; it does not withstand somebody who means to deceive."""

    size: int
    xxh3_128: str


class SummingFileSystem(FileSystem):
    """A file system for torch.distributed.checkpoint's writer that keeps the sums of what goes through it.

    Reading hundreds of GB back to hash them would take as long as writing them did.
    """

    def __init__(self) -> None:
        self.sums: dict[Path, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        """A stream to a file; one that is open for writing can only be appended to."""
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            summing = _SummingStream(cast(IO[bytes], stream))
            try:
                yield summing
            except RuntimeError as error:
                if summing.error is not None:  # torch's writer has lost why: a full disk, a quota
                    raise summing.error from error
                raise
            self.sums[Path(path)] = summing.sum()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path)] = self.sums.pop(Path(path))


class _SummingStream:
    """The part of a binary file that writers need. There is no seek: what is written twice would be summed twice."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self.error: OSError | None = None
        self.flush, self.fileno, self.tell, self.close = stream.flush, stream.fileno, stream.tell, stream.close

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def sum(self) -> FileSum:
        return FileSum(self._size, self._digest.hexdigest())


def sum_file(path: Path) -> FileSum:
    """Read a file for its sum, and flush it to the disk.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return FileSum(size, digest.hexdigest())


def wrong_sizes(folder: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """Files of a folder that are missing or have another size; costs no reading. Relative paths in `sums`."""
    return [f"{name} {problem}" for name, wanted in sums.items() if (problem := _wrong_size(folder / name, wanted))]


def damaged_files(folder: Path, sums: Mapping[str, FileSum]) -> Iterable[tuple[str, str | None]]:
    """Read the files of a folder one by one: each one's relative path, and what is wrong with it or None."""
    for name, wanted in sums.items():
        problem = _wrong_size(folder / name, wanted)
        if problem is None and sum_file(folder / name) != wanted:
            problem = "has other content than what was written"
        yield name, problem


def _wrong_size(path: Path, wanted: FileSum) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == wanted.size else f"has {size} bytes of {wanted.size}"
