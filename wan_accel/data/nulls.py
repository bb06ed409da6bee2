"""The null part of a latents folder: what stands in where a condition is dropped, or where nothing is known."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wan_accel.data import store
from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.schema import LATENTS_SCHEMA, NULL_KINDS


def bucket_key(num_frames: int, height: int, width: int) -> str:
    """The shape key of the null dataset, e.g. 21x448x256."""
    return f"{num_frames}x{height}x{width}"


class Nulls:
    """The null rows of a latents folder, in memory; each has a kind (`NULL_KINDS`) and a shape, which may be empty.

    Raises:
        StoreError, SchemaError: the part is not there, damaged, or of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = list(store.load(root / "null", LATENTS_SCHEMA))
        self._tensors = {(row["kind"], row["shape"]): cell_to_tensor(row["tensor"]) for row in rows}
        self._keys = {(row["kind"], row["shape"]): row["key"] for row in rows}

    def keys_of(self, kind: str) -> set[str]:
        """What the rows that stand in for a kind of condition were made with."""
        return {key for (name, _), key in self._keys.items() if NULL_KINDS[name] == kind}

    def check(self, needs: Mapping[tuple[str, str], str]) -> None:
        """Refuse to go on without rows that will be drawn; `needs` says of each what needs it.

        Raises:
            LatentsError: every one that is missing.
        """
        missing = [f"{kind} {shape}".strip() + f" ({why})" for (kind, shape), why in needs.items()
                   if (kind, shape) not in self._tensors]  # fmt: skip
        if missing:
            raise LatentsError(
                f"{self.root}/null has no {'; no '.join(missing)}: run wan_accel.cache on it again, or set the dropout "
                "to 0"
            )

    def get(self, kind: str, shape: str = "") -> Tensor:
        """The tensor of a row.

        Raises:
            LatentsError: it was not cached.
        """
        if (kind, shape) not in self._tensors:
            raise LatentsError(
                f"{self.root}/null has no {kind} {shape}".rstrip() + ": run wan_accel.cache on it again, or set the "
                "dropout that needs it to 0"
            )
        return self._tensors[kind, shape]
