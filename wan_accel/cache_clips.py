"""The clips part of a latents folder: ranks claim parts to write again and clips to encode, one by one."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from tqdm import tqdm

from wan_accel.cache_claims import Claims
from wan_accel.cache_plan import is_stale, other_keys
from wan_accel.cache_source import ClipsSource
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.revisions import PartRewriter, take_over
from wan_accel.data.schema import latents_features
from wan_accel.models.conditioning.clips import ClipEncoder

logger = logging.getLogger("wan_accel")
Item = TypeVar("Item")
_BATCH_BYTES = 64 << 20  # readers map batches lazily, but `load_from_disk` pays for each


class ClipsJob:
    """Encodes clips, and of stale rows only what is stale.

    Args:
        root: the latents folder.
        source: the clips.
        encoder: of this rank.
        keys: of each kind of condition of a clip.
        state: of this rank.
    """

    def __init__(
        self, root: Path, source: ClipsSource, encoder: ClipEncoder, *, keys: Mapping[str, str], state: PartialState
    ) -> None:
        self.root = root / "clips"
        self.rejected = root / "rejected.jsonl"
        self.source = source
        self.encoder = encoder
        self.keys = keys
        self.state = state
        self.features = latents_features()

    @property
    def claims(self) -> Path:
        """Inside a folder that is surely ours, since it is removed."""
        return self.root / "claims"

    def run(self, parts: Sequence[Path], new: Sequence[str]) -> None:
        """Every rank calls it with the same parts and clip ids. No collectives but a barrier between the two passes."""
        self._rewrite(parts)
        self.state.wait_for_everyone()  # a writer tidies its folder, where another rank may have written a revision
        if self.state.is_main_process:
            take_over(self.root, self.features)
        self.state.wait_for_everyone()
        self._encode(new)

    def _rewrite(self, parts: Sequence[Path]) -> None:
        for part in self._claimed(parts, "stale parts"):
            with PartRewriter(self.root, part, features=self.features, batch_bytes=_BATCH_BYTES) as writer:
                for batch in store.batches(part):
                    for index in range(batch.num_rows):
                        row = self._refreshed(store.plain_row(batch, index))
                        if row is not None:
                            writer.write(row)
            if self.state.is_main_process:  # the only one to write state.json in this pass
                take_over(self.root, self.features)

    def _refreshed(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        """A stored row with its stale columns encoded again; None if its clip is gone or cannot be encoded."""
        if not is_stale(stored, self.source, self.keys):
            return stored
        if self.source.is_missing(stored["clip_id"]):
            logger.info("clip %s is no longer in data.clips: dropped", stored["clip_id"])
            return None
        number = self.source.row_of(stored["clip_id"])
        clip = self.source.rows[number]
        described = self.source.describe(number, clip, self.keys)
        stale = other_keys(stored, self.keys) | {
            kind for kind, content in described["content"].items() if stored["content"][kind] != content
        }
        try:
            columns = self._columns(clip, [kind for kind in self.keys if kind in stale])
        except torch.OutOfMemoryError as error:
            self._reject(clip, error)
            return stored  # its other columns are good; it is still stale, and the next run tries again
        return None if columns is None else {**stored, **described, **columns}

    def _encode(self, clip_ids: Sequence[str]) -> None:
        with store.PartWriter(
            self.root,
            writer=f"rank{self.state.process_index}",
            features=self.features,
            batch_bytes=_BATCH_BYTES,
        ) as writer:
            writer.write_each(self._encoded(clip_ids))  # what is encoded is kept, whatever stops this rank

    def _encoded(self, clip_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        for clip_id in self._claimed(clip_ids, "clips"):
            number = self.source.row_of(clip_id)
            clip = self.source.rows[number]
            try:
                columns = self._columns(clip, list(self.keys))
            except torch.OutOfMemoryError as error:
                self._reject(clip, error)
                continue
            if columns is not None:
                yield {**self.source.describe(number, clip, self.keys), **columns}

    def _columns(self, clip: Mapping[str, Any], kinds: Collection[str]) -> dict[str, Any] | None:
        """The tensor columns of some kinds; None, and a line in rejected.jsonl, for a clip that cannot be encoded.

        A network that cannot be loaded stops this rank: it would reject every clip, and faster than others encode them.
        """
        if not kinds:
            return {}
        self._load(kinds)
        try:
            return self.encoder.encode(load_clip(clip), modes=clip.get("modes") or [], kinds=kinds)
        except ValueError as error:
            self._reject(clip, error)
            return None

    def _load(self, kinds: Collection[str]) -> None:
        try:
            self.encoder.load(kinds)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"{self.encoder.device} cannot hold the encoders ({error}): free it") from None

    def _reject(self, clip: Mapping[str, Any], error: Exception) -> None:
        logger.warning("clip %s is left out: %s", clip["clip_id"], error)
        with self.rejected.open("a") as file:
            file.write(json.dumps({"clip_id": clip["clip_id"], "reason": str(error)}) + "\n")

    def _claimed(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """Those of the items that this rank gets; the bar of the main rank shows what all ranks have."""
        bar = tqdm(total=len(items), desc=what, disable=not items or not self.state.is_main_process)
        for number in Claims(self.claims, what.replace(" ", "-"), len(items)):
            bar.update(number + 1 - bar.n)
            yield items[number]
        bar.close()
