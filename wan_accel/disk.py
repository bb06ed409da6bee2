"""Room on a disk, before something large is written. Torch-free."""

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int:
    """What is free on the disk that `path` is on, or will be on."""
    path = path.resolve()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
