"""Datasets on disk: the contract (`schema`), the protocol (`store`), clips, latents. Importing it loads nothing."""

from importlib import import_module
from typing import Any

_LAZY = {
    "load_clip": "wan_accel.data.clips",
    "Clip": "wan_accel.data.clips",
    "load": "wan_accel.data.store",
    "LatentsDataset": "wan_accel.data.latents",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
