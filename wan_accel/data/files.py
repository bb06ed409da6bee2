"""Text files that are replaced at once, and the full disk as one clear error. Torch-free."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from wan_accel.data.store_error import StoreError


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once; each write has its own temporary file, also across machines."""
    _replace(path, json.dumps(content, indent=1))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file at once."""
    _replace(path, "".join(f"{line}\n" for line in lines))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with full_disk(path), temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" (and its relatives) into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"no space left for {path} ({error.strerror}): free some and run the same command again; "
                "finished parts are kept"
            ) from error
        raise
