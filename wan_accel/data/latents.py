"""The dataset of cached conditions that training draws from.

<root>/clips   a row a clip: latents and conditions
<root>/text    a row a distinct caption
<root>/null    what dropout and plain animation need
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.conditions import check_shapes, inputs_of
from wan_accel.data.digest import RowsDigest, digest_rows
from wan_accel.data.nulls import Nulls, bucket_key
from wan_accel.data.rows import Row, Rows
from wan_accel.data.schema import KINDS, LATENTS_SCHEMA
from wan_accel.data.selection import choose_rows
from wan_accel.data.texts import Texts
from wan_accel.draws import Bucket, DatasetIndex, SampleDraw
from wan_accel.models.variants import Variant

_LIGHT = ("clip_id", "num_frames", "height", "width", "num_known", "source_sha256", "caption_id", "keys")
_TELLING = ["clip_id", "num_frames", "height", "width", "num_known", "source_sha256"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """A clip's name, caption and frames a second; of several folders, the one that tells it from others' clips."""

    clip_id: str
    caption: str
    fps: float
    folder: str = ""

    @property
    def name(self) -> str:
        """What the clip is called where clips of all folders stand together."""
        return f"{self.folder}/{self.clip_id}" if self.folder else self.clip_id


def list_parts(root: Path) -> dict[str, list[str]]:
    """The parts of a latents folder, to open it with on other ranks too: it may be growing.

    Raises:
        StoreError: it is not there.
    """
    # Texts are written before the clips that have them, so they are listed after.
    return {name: store.listed(root / name) for name in ("clips", "text")}


class LatentsDataset:
    """The latents folder that `wan_accel.cache` writes, as a source of training samples.

    Tensors stay on the disk until a sample needs them; a process holds the small columns of all rows only.

    Args:
        root: the folder.
        where: which rows, an expression over their small columns (`data.where`); all by default.
        captions: captions by clip_id in place of those of the rows; their texts must have been encoded.
        variant: what is trained: latents and conditions are checked to have its shapes. None: they are not checked.
        listing: parts of the folder (`list_parts`), those that are listed now by default.

    Raises:
        StoreError, SchemaError: it is not there, damaged, or of another version.
        LatentsError: it has clips but not their texts.
        ValueError: `where` makes no sense, or holds for no row.
    """

    def __init__(
        self,
        root: Path,
        *,
        where: str | None = None,
        captions: Mapping[str, str] | None = None,
        variant: Variant | None = None,
        listing: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.root = Path(root)
        self.variant = variant
        self._captions = captions or {}
        light = _LIGHT if where is None else (*_LIGHT, "caption", "fps", "modes", "quality")
        listing = list_parts(self.root) if listing is None else listing
        self._clips = Rows(self.root / "clips", LATENTS_SCHEMA, light=light, listing=listing["clips"])
        self._texts = Texts(self.root, overlaid=bool(self._captions), listing=listing["text"])
        self._nulls = Nulls(self.root)
        self._table = self._clips.table
        self._stored: np.ndarray | None = None  # the row in the folder of each of ours; None: all of them
        if where is not None:
            self._choose(where)
        self._caption_ids = self._caption_ids_of_rows()
        # With an overlay only when they are asked for: whether it fits is told by the ids of all folders of a mixture.
        if not self._captions:
            self._texts.check(self._caption_ids)
        self._text_key: str | None = None
        self._text_rows: np.ndarray | None = None

    def _choose(self, where: str) -> None:
        captions = [self._captions.get(*item) for item in zip(self.clip_ids, self._table["caption"].to_pylist())]
        self._stored = np.array(choose_rows(self._table, captions, where), dtype=np.int64)
        if len(self._stored) == 0:
            raise LatentsError(f"data.where={where!r} holds for no row of {self.root}: loosen it")
        # Captions of a million rows are hundreds of MB, and only the choice had to know them.
        kept = [name for name in self._table.column_names if name.split(".")[0] in _LIGHT]
        self._table = self._table.select(kept).take(self._stored)
        self._clips.table = self._clips.table.select(["clip_id"])

    def _caption_ids_of_rows(self) -> pa.Array:
        own = self._table["caption_id"].combine_chunks()
        if not self._captions:
            return own
        overlay = {name: caption_id(caption) for name, caption in self._captions.items()}
        return pa.array([overlay.get(name, found) for name, found in zip(self.clip_ids, own.to_pylist())])

    def __len__(self) -> int:
        return len(self._table)

    def _row(self, index: int) -> Row:
        return self._clips[index if self._stored is None else int(self._stored[index])]

    @property
    def clip_ids(self) -> list[str]:
        """Names of the clips, in order."""
        return self._table["clip_id"].to_pylist()

    @property
    def all_clip_ids(self) -> list[str]:
        """Clips of the folder, chosen or not."""
        return self._clips.table["clip_id"].to_pylist()

    @property
    def group_ids(self) -> list[str]:
        """The source of every row: clips of one source stay on one side of a validation split."""
        return self._table["source_sha256"].to_pylist()

    @cached_property
    def digest(self) -> RowsDigest:
        """Of everything that the order of samples and their texts depend on."""
        return digest_rows(self._table.select(_TELLING).append_column("caption_id", self._caption_ids))

    def index(self) -> DatasetIndex:
        """Buckets and known-variant counts for the step plan."""
        shapes = zip(*(self._table[name].to_pylist() for name in ("num_frames", "height", "width")))
        return DatasetIndex(
            buckets=tuple(Bucket(*shape) for shape in shapes),
            num_known=tuple(count or 0 for count in self._table["num_known"].to_pylist()),
        )

    @property
    def keys(self) -> dict[str, str]:
        """What each kind of condition was made with (`condition_keys`).

        Raises:
            LatentsError: rows differ in it.
        """
        self._check_uniform(KINDS)
        return {kind: key for kind in KINDS for key in self._keys_of(kind)}

    def _keys_of(self, kind: str) -> set[str]:
        """Those of every row that is of a kind or stands in for it."""
        clips = set(self._table[f"keys.{kind}"].unique().to_pylist()) - {None}
        texts = (self._texts.keys if self._text_key is None else {self._text_key}) if kind == "text" else set()
        return clips | self._nulls.keys_of(kind) | texts

    def check_keys(self, expected: Mapping[str, str]) -> None:
        """Refuse to train on conditions that other weights or settings made.

        Args:
            expected: keys by kind (`condition_keys`). Of kinds that are left out, since the checkpoint does not have
                their encoders, all rows must have the same key.

        Raises:
            LatentsError: names the kinds, and how to encode again.
        """
        self._text_key = expected.get("text")  # old texts are there too while they are encoded anew
        if stale := [kind for kind, key in expected.items() if self._keys_of(kind) - {key}]:
            raise self._stale(stale)
        self._check_uniform([kind for kind in KINDS if kind not in expected])
        (self._text_key,) = self._keys_of("text")
        self._text_rows = self._texts.find(self._caption_ids, key=self._text_key)
        if self._text_rows is None:
            raise self._stale(["text"])

    def _stale(self, kinds: Sequence[str]) -> LatentsError:
        return LatentsError(
            f"{self.root}: {', '.join(sorted(set(kinds)))} was encoded with other weights or settings than this "
            "recipe's: run wan_accel.cache with this recipe, which encodes only that again"
        )

    def _check_uniform(self, kinds: Collection[str]) -> None:
        if mixed := [kind for kind in kinds if len(self._keys_of(kind)) > 1]:
            raise LatentsError(
                f"{self.root}: {', '.join(sorted(mixed))} is in part of other weights or settings than the rest, since "
                "a run of wan_accel.cache has not come to its end: run it again with a checkpoint that has the encoders"
            )

    def check_nulls(self, *, caption_dropout: float, face_dropout: float) -> None:
        """Refuse dropouts, and clips of which nothing may be known, without the null rows that stand in for them.

        Raises:
            LatentsError: every one that is missing, and what needs it.
        """
        needs = {("empty_prompt", ""): f"data.caption_dropout={caption_dropout}"} if caption_dropout else {}
        if face_dropout:
            needs["face", ""] = f"data.face_dropout={face_dropout}"
        if self._table["keys.known"].null_count < len(self._table):
            for bucket in sorted(set(self.index().buckets)):
                needs["animation_known", bucket_key(*bucket)] = f"clips of {bucket_key(*bucket)}"
        self._nulls.check(needs)

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """The denoiser's inputs for one draw, without a batch dim; see `inputs_of`.

        Raises:
            LatentsError: the draw needs a null row that was not cached, or the row is damaged or contradicts its
                bucket; the clip is named.
        """
        row = self._row(index)
        try:
            text = self._nulls.get("empty_prompt") if draw.drop_caption else self._text_of(index)
            if self.variant is not None:
                check_shapes(row, draw, self.variant)
            inputs = inputs_of(row, cell_to_tensor(row["latents"]), draw, self._nulls)
        except LatentsError as error:
            raise LatentsError(f"{self.root}: clip {row['clip_id']} (row {index}): {error}") from error
        generator = torch.Generator().manual_seed(draw.noise_seed)
        return {**inputs, "text": text, "noise": torch.randn(inputs["latents"].shape, generator=generator)}

    def _text_of(self, index: int) -> Tensor:
        if self._text_rows is None:
            self.check_keys({})
        assert self._text_rows is not None
        return self._texts.embeddings(int(self._text_rows[index]))

    def clip_info(self, index: int) -> ClipInfo:
        """What to call the clip of a row."""
        row = self._row(index)
        caption = self._captions.get(row["clip_id"], row["caption"])
        return ClipInfo(clip_id=row["clip_id"], caption=caption, fps=float(row["fps"]))

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a batch with the negative prompt and, where there are faces, none: what guidance leaves.

        Raises:
            LatentsError: a null row was not cached.
        """
        batch = len(inputs["text"])
        changed = {"text": self._nulls.get("negative_prompt").expand(batch, -1, -1)}
        if "motion_vectors" in inputs:
            changed["motion_vectors"] = self._nulls.get("face").expand(inputs["motion_vectors"].shape).clone()
        return {**inputs, **changed}
