"""The clips that are to be encoded: a clips dataset under a caption overlay and a filter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from wan_accel.data.captions import caption_id, check_clip_ids, read_captions
from wan_accel.data.digest import RowsDigest, digest_rows
from wan_accel.data.fingerprint import content_hashes, fingerprints
from wan_accel.data.rows import Row, Rows
from wan_accel.data.schema import CLIPS_SCHEMA, LATENTS_SCHEMA
from wan_accel.data.selection import choose_rows
from wan_accel.models.variants import Variant

Shape = tuple[int, int, int]  # frames, height, width
_LIGHT = (
    "clip_id", "source", "caption", "num_frames", "height", "width", "fps", "purpose", "modes", "quality",
)  # fmt: skip


class ClipsSource:
    """A clips dataset as the cache sees it.

    Args:
        root: the clips dataset.
        variant: what is to be trained.
        captions: a file of captions (`data.captions`); their texts are encoded, the rows keep their own.
        where: an expression over the small columns (`data.where`).
        listing: the parts to read (`store.listed`), those that are listed now by default.

    Raises:
        StoreError, SchemaError: it is missing, damaged, or of another schema.
        ValueError: it holds no clips for training this variant, has a clip twice, or the captions or the expression do
            not fit it.
    """

    def __init__(
        self,
        root: Path,
        variant: Variant,
        *,
        captions: str | None = None,
        where: str | None = None,
        listing: Sequence[str] | None = None,
    ) -> None:
        self.rows = Rows(root, CLIPS_SCHEMA, light=_LIGHT, listing=listing)
        if variant.has_animate_adapter:
            self._refuse_driving_clips(root)
        table = self.rows.table
        self.clip_ids: list[str] = table["clip_id"].to_pylist()
        _refuse_duplicates(self.clip_ids, root)
        self._own_captions: list[str] = [caption or "" for caption in table["caption"].to_pylist()]
        self.captions = self._own_captions
        if captions is not None:
            overlay = read_captions(Path(captions))
            check_clip_ids(overlay, self.clip_ids, captions)
            self.captions = [overlay.get(name, own) for name, own in zip(self.clip_ids, self._own_captions)]
        self.chosen = choose_rows(table, self.captions, where)
        if not self.chosen:
            raise ValueError(f"data.where={where!r} holds for no clip of {root}: loosen it")
        self._is_chosen = set(self.chosen)
        self._row_of = {name: row for row, name in enumerate(self.clip_ids)}
        self._fingerprints = fingerprints(self.rows.parts)

    def _refuse_driving_clips(self, root: Path) -> None:
        if "purpose" not in self.rows.table.column_names:
            raise ValueError(f"{root} has no Animate columns: make it with `wan-preprocess animate --purpose train`")
        if "drive" in self.rows.table["purpose"].unique().to_pylist():
            raise ValueError(
                f"{root} holds clips made with --purpose drive (another character's picture, retargeted poses): their "
                "video does not show what the pose says. Make training clips with --purpose train"
            )

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def digest(self) -> RowsDigest:
        """Of the chosen clips, of what they are made of, and of their captions."""
        captions = [caption_id(caption) for caption in self.captions]
        columns = {"clip_id": self.clip_ids, "fingerprint": self._fingerprints, "caption_id": captions}
        return digest_rows(pa.table(columns).take(self.chosen))

    def shapes(self, rows: list[int]) -> list[Shape]:
        """Frames, height and width of rows."""
        columns = self.rows.table.select(["num_frames", "height", "width"]).take(pa.array(rows, pa.int64()))
        return list(zip(*(column.to_pylist() for column in columns.columns)))

    def row_of(self, clip_id: str) -> int:
        """The row of a clip that is not missing."""
        return self._row_of[clip_id]

    def is_current(self, stored: Mapping[str, Any]) -> bool:
        """Tell whether a stored row was made of the clip as it is now; of clips that are not chosen it is."""
        row = self._row_of.get(stored["clip_id"])
        if row is None or row not in self._is_chosen:
            return True
        return (
            stored["fingerprint"] == self._fingerprints[row]
            and stored["caption_id"] == caption_id(self._own_captions[row])
        )

    def is_chosen(self, clip_id: str) -> bool:
        return self._row_of.get(clip_id) in self._is_chosen

    def is_missing(self, clip_id: str) -> bool:
        return clip_id not in self._row_of

    def describe(self, row: int, clip: Row, keys: Mapping[str, str]) -> dict[str, Any]:
        """The columns of a latents row that are no tensors. `keys` of each kind of condition of a clip."""
        caption = self._own_captions[row]
        return {
            "schema": LATENTS_SCHEMA, "source_sha256": clip["source"]["sha256"], "caption": caption,
            "caption_id": caption_id(caption), "modes": clip.get("modes") or [], "keys": dict(keys),
            "quality": clip.get("quality"), "fingerprint": self._fingerprints[row],
            "content": content_hashes(clip, keys.keys()),
            **{name: clip[name] for name in ("clip_id", "num_frames", "height", "width", "fps")},
        }  # fmt: skip


def _refuse_duplicates(clip_ids: Sequence[str], root: Path) -> None:
    """Latents are found by clip_id: of two clips under one name the second would be encoded again in every run."""
    twice = [name for name, count in Counter(clip_ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"{root} has {len(twice)} clip_ids on several rows, e.g. {twice[0]}: `wan-preprocess verify {root}` lists "
            "them; remove one of the parts"
        )
