"""What a run of the cache has to do, and what that costs: found by comparing the clips with the folder. Reads only."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_accel.cache_bytes import bytes_of_rows
from wan_accel.cache_source import ClipsSource
from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.models.conditioning.clips import STORED
from wan_accel.models.conditioning.estimate import bytes_by_column, videos_per_clip
from wan_accel.models.conditioning.text import NULL_PROMPTS
from wan_accel.models.variants import TEXT_LENGTH, Variant

GIB = 2**30
# VAE 2.1, one H100: 81 frames of 480 x 832 in 1.34 s. Only for the estimate of --dry-run.
_SECONDS_PER_PIXEL = 1.34 / (81 * 480 * 832)
_TEXT = "text (about)"
_STORED_COLUMNS = ["clip_id", "caption_id", "fingerprint", "keys"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipWork:
    """Clips by clip_id and the kinds of conditions to encode of each; parts that hold stale rows.

    replaced: bytes of stored tensors whose place those of the stale rows take.
    """

    new: tuple[str, ...]
    stale: Mapping[str, frozenset[str]]
    parts: tuple[Path, ...]
    replaced: int


def plan_clips(source: ClipsSource, root: Path, keys: Mapping[str, str]) -> ClipWork:
    """What the clips part lacks or holds of other weights, settings, or clips that were changed since.

    Args:
        source: the clips as they are now.
        root: the clips part of a latents folder, which need not exist.
        keys: of each kind of condition of a clip.

    Raises:
        ValueError: the folder holds clips, but none of this dataset.
    """
    done: set[str] = set()
    stale: dict[str, frozenset[str]] = {}
    parts, replaced = [], 0
    for part in store.whole_parts(root):
        for batch in store.batches(part):
            rows = batch.select(_STORED_COLUMNS).to_pylist()
            done.update(row["clip_id"] for row in rows)
            stale_here = [(n, row) for n, row in enumerate(rows) if is_stale(row, source, keys)]
            if not stale_here:
                continue
            found = {n: _kinds_to_encode(row, source, keys) for n, row in stale_here}
            parts.append(part)
            replaced += bytes_of_rows(batch, found)
            stale |= {row["clip_id"]: found[n] for n, row in stale_here if not source.is_missing(row["clip_id"])}
    if done and all(source.is_missing(clip_id) for clip_id in done):
        raise ValueError(
            f"{root.parent} holds conditions of other clips than data.clips: choose another data.latents folder"
        )
    new = tuple(name for row in source.chosen if (name := source.clip_ids[row]) not in done)
    return ClipWork(new=new, stale=stale, parts=tuple(dict.fromkeys(parts)), replaced=replaced)


def is_stale(stored: Mapping[str, Any], source: ClipsSource, keys: Mapping[str, str]) -> bool:
    """Tell whether a stored row is to be made again, or dropped since its clip is gone.

    Rows of clips that `data.where` leaves out stay as they are.
    """
    if source.is_missing(stored["clip_id"]):
        return bool(other_keys(stored, keys))
    if not source.is_chosen(stored["clip_id"]):
        return False
    return bool(other_keys(stored, keys)) or not source.is_current(stored)


def other_keys(stored: Mapping[str, Any], keys: Mapping[str, str]) -> frozenset[str]:
    """The kinds that a stored row has with another key."""
    return frozenset(kind for kind, key in keys.items() if stored["keys"][kind] != key)


def _kinds_to_encode(stored: Mapping[str, Any], source: ClipsSource, keys: Mapping[str, str]) -> frozenset[str]:
    """At most these: of a clip that was changed, only its content tells which."""
    return other_keys(stored, keys) if source.is_current(stored) else frozenset(keys)


def plan_texts(source: ClipsSource, root: Path, key: str) -> list[str]:
    """Every distinct caption, and the prompts that stand for none, that the text part does not hold with this key."""
    captions = {source.captions[row] for row in source.chosen}
    done = {
        row["caption_id"]
        for part in store.whole_parts(root)
        for batch in store.batches(part)
        for row in batch.select(["caption_id", "key"]).to_pylist()
        if row["key"] == key
    }
    return sorted(caption for caption in captions | {*NULL_PROMPTS.values()} if caption_id(caption) not in done)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Bytes that are still to be written, by column; of texts only about, at a token for 3 bytes.

    again: bytes among them that take the place of stale ones, which are `replaced` bytes.
    rewritten: bytes of the parts that hold stale rows, the largest of which has `largest_part`.
    """

    sizes: Mapping[str, int]
    again: int
    replaced: int
    rewritten: int
    largest_part: int
    gpu_hours: float

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def peak(self, num_processes: int) -> int:
        """Bytes that must be free: for texts, then for parts beside their new revisions, then for new clips.

        Each rank writes one part again at a time, and the main one removes the old ones after each of its own: about
        two parts a rank are there twice. Of the new revisions only what they have grown by stays.
        """
        grown = self.again - self.replaced
        twice = min(self.rewritten, num_processes * 2 * self.largest_part)
        return max(self.sizes[_TEXT] + max(grown, 0) + twice, self.total - self.again + grown)

    def lines(self, free_bytes: int) -> Iterable[str]:
        """What --dry-run prints."""
        yield from (f"{size / GIB:10.3f} GiB  {name}" for name, size in self.sizes.items())
        if self.rewritten:
            yield f"{self.replaced / GIB:10.3f} GiB  there already, of which they take the place"
            yield f"{self.rewritten / GIB:10.3f} GiB  parts written again, of which only stale columns are encoded"
        yield f"{self.total / GIB:10.3f} GiB  in all ({free_bytes / GIB:.1f} GiB free)"
        yield f"{self.gpu_hours:10.3f} GPU hours of one H100 (videos only)"


def estimate(
    variant: Variant,
    source: ClipsSource,
    work: ClipWork,
    captions: list[str],
    *,
    every_kind: Collection[str],
    known_variants: int,
) -> Estimate:
    """Sizes and GPU hours of a plan; `every_kind` are those of a clip that is new."""
    kinds = {**dict.fromkeys(work.new, frozenset(every_kind)), **work.stale}
    tokens = sum(min(len(caption.encode()) // 3 + 1, TEXT_LENGTH) for caption in captions)
    sizes = Counter({_TEXT: tokens * variant.dit.text_dim * STORED.itemsize})
    sizes.update(dict.fromkeys(bytes_by_column(variant, (1, 0, 0), kinds=every_kind, known_variants=known_variants), 0))
    again = pixels = 0
    for name, shape in zip(kinds, source.shapes([source.row_of(name) for name in kinds])):
        columns = bytes_by_column(variant, shape, kinds=kinds[name], known_variants=known_variants)
        sizes.update(columns)
        again += sum(columns.values()) if name in work.stale else 0
        videos = videos_per_clip(variant, kinds=kinds[name], known_variants=known_variants)
        pixels += shape[0] * shape[1] * shape[2] * videos
    parts = [part.stat().st_size for part in work.parts]
    return Estimate(
        sizes=dict(sizes),
        again=again,
        replaced=work.replaced,
        rewritten=sum(parts),
        largest_part=max(parts, default=0),
        gpu_hours=pixels * _SECONDS_PER_PIXEL / 3600,
    )
