"""The text part of a latents folder: each distinct caption once, found by its id and the encoder that made it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.rows import Rows
from wan_accel.data.schema import LATENTS_SCHEMA


class Texts:
    """The embeddings of captions, on the disk until they are asked for.

    Args:
        root: the latents folder.
        overlaid: whether captions of a file replace those of the rows (`data.captions`), for errors.
        listing: its parts.

    Raises:
        StoreError, SchemaError: the part is not there, damaged, or of another version.
    """

    def __init__(self, root: Path, *, overlaid: bool, listing: Sequence[str]) -> None:
        self.root = root
        self._overlaid = overlaid
        self._rows = Rows(root / "text", LATENTS_SCHEMA, light=("caption_id", "key"), listing=listing)

    @property
    def keys(self) -> set[str]:
        """What texts were made with: one key, or more while they are encoded anew or after that was interrupted."""
        return set(self._rows.table["key"].unique().to_pylist())

    def check(self, caption_ids: pa.Array) -> None:
        """Refuse captions that no encoder has encoded.

        Raises:
            LatentsError: how many.
        """
        if count := self._find(caption_ids, np.arange(len(self._rows))).null_count:
            raise LatentsError(
                f"{self.root} has no text for {count} clips: run wan_accel.cache on it again"
                + (", with the same data.captions" if self._overlaid else "")
            )

    def find(self, caption_ids: pa.Array, *, key: str) -> np.ndarray | None:
        """The row of each caption by the encoder of `key`; None if one of them is only there by another.

        Raises:
            LatentsError: captions that no encoder has encoded.
        """
        rows = np.flatnonzero(pc.equal(self._rows.table["key"], key).to_numpy())
        found = self._find(caption_ids, rows)
        if found.null_count:
            self.check(caption_ids)
            return None
        return rows[found.to_numpy()]

    def _find(self, caption_ids: pa.Array, rows: np.ndarray) -> pa.Array:
        """The place in `rows` of each caption, null where there is none."""
        return pc.index_in(caption_ids, value_set=self._rows.table["caption_id"].take(rows).combine_chunks())

    def embeddings(self, row: int) -> Tensor:
        """(L, text_dim)."""
        return cell_to_tensor(self._rows[row]["embeddings"])
