"""Cached conditions: tensors in cells of a row, and the dataset that training draws from.

<root>/clips   a row a clip: latents and conditions
<root>/text    a row a distinct caption
<root>/null    what dropout and plain animation need
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from wan_accel.data import store
from wan_accel.data.captions import caption_id
from wan_accel.data.digest import RowsDigest, digest_rows
from wan_accel.data.rows import Row, Rows
from wan_accel.data.schema import KINDS, LATENTS_SCHEMA, NULL_KINDS
from wan_accel.data.selection import choose_rows
from wan_accel.models.conditioning.animate import NUM_MASK_CHANNELS, join_condition
from wan_accel.models.conditioning.image import join_first_frame
from wan_accel.models.variants import Variant
from wan_accel.step_plan import NO_KNOWN, Bucket, DatasetIndex, SampleDraw

_LIGHT = ("clip_id", "num_frames", "height", "width", "num_known", "source_sha256", "caption_id", "keys")
_TELLING = ["clip_id", "num_frames", "height", "width", "num_known", "source_sha256"]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class LatentsError(store.StoreError):
    """Cached conditions that cannot be trained on: what is missing or stale, and what to do."""


def tensor_to_cell(tensor: Tensor) -> dict[str, Any]:
    """A tensor as {dtype, shape, data}; bfloat16 bit for bit."""
    tensor = tensor.detach().cpu().contiguous()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
    }


def cell_to_tensor(cell: Mapping[str, Any]) -> Tensor:
    """The inverse of `tensor_to_cell`.

    Raises:
        ValueError: the cell's bytes do not have the length that its shape says.
    """
    dtype, shape = _DTYPES[cell["dtype"]], [int(n) for n in cell["shape"]]
    data = bytearray(cell["data"])
    if len(data) != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"a tensor cell has {len(data)} bytes, expected shape {shape} of {cell['dtype']}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def bucket_key(num_frames: int, height: int, width: int) -> str:
    """The shape key of the null dataset, e.g. 21x448x256."""
    return f"{num_frames}x{height}x{width}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """A clip's name, caption and frames a second."""

    clip_id: str
    caption: str
    fps: float


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
        variant: what is trained: latents are checked to have its shapes. None: they are not checked.
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
        self._text = Rows(
            self.root / "text", LATENTS_SCHEMA, light=("caption_id", "key"), listing=listing["text"]
        )
        self._null_keys: dict[tuple[str, str], str] = {}
        self._null = self._load_null()
        self._stored = np.arange(len(self._clips))  # the row in the folder of each of ours
        self.clip_ids: list[str] = self._clips.table["clip_id"].to_pylist()
        if where is not None:
            self._choose(where)
        self._table = self._clips.table.take(self._stored)
        self._caption_ids = self._caption_ids_of_rows()
        # With an overlay only when they are asked for: whether it fits is told by the ids of all folders of a mixture.
        self._found_texts = self._find_texts(key=None) if not self._captions else None

    def _choose(self, where: str) -> None:
        table = self._clips.table
        captions = [self._captions.get(*item) for item in zip(self.clip_ids, table["caption"].to_pylist())]
        self._stored = np.array(choose_rows(table, captions, where), dtype=np.int64)
        if len(self._stored) == 0:
            raise LatentsError(f"data.where={where!r} holds for no row of {self.root}: loosen it")
        self.clip_ids = [self.clip_ids[row] for row in self._stored]

    def _caption_ids_of_rows(self) -> pa.Array:
        own = self._table["caption_id"].to_pylist()
        if not self._captions:
            return pa.array(own)
        overlay = {name: caption_id(caption) for name, caption in self._captions.items()}
        return pa.array([overlay.get(name, found) for name, found in zip(self.clip_ids, own)])

    @property
    def _text_rows(self) -> np.ndarray:
        if self._found_texts is None:
            self._found_texts = self._find_texts(key=None)
        return self._found_texts

    def _find_texts(self, key: str | None) -> np.ndarray:
        """The text row of every row. While texts are encoded anew old ones are there too: `key` tells which."""
        table = self._text.table
        rows = np.flatnonzero(pc.equal(table["key"], key).to_numpy()) if key is not None else np.arange(len(table))
        found = pc.index_in(self._caption_ids, value_set=table["caption_id"].take(rows).combine_chunks())
        if found.null_count:
            if key is not None:
                self._find_texts(key=None)  # raises where a text is missing altogether
                raise self._stale(["text"])
            raise LatentsError(
                f"{self.root} has no text for {len(found.filter(found.is_null()))} clips: run wan_accel.cache on it "
                "again" + (", with the same data.captions" if self._captions else "")
            )
        return rows[found.to_numpy()]

    def _load_null(self) -> dict[tuple[str, str], Tensor]:
        rows = store.load(self.root / "null", LATENTS_SCHEMA)
        self._null_keys = {(row["kind"], row["shape"]): row["key"] for row in rows}
        return {(row["kind"], row["shape"]): cell_to_tensor(row["tensor"]) for row in rows}

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def all_clip_ids(self) -> list[str]:
        """Clips of the folder, chosen or not."""
        return self._clips.table["clip_id"].to_pylist()

    @property
    def group_ids(self) -> list[str]:
        """The source of every row: clips of one source stay on one side of a validation split."""
        return self._table["source_sha256"].to_pylist()

    @property
    def digest(self) -> RowsDigest:
        """Of everything that the order of samples and their texts depend on."""
        return digest_rows(self._table.select(_TELLING).append_column("caption_id", self._caption_ids))

    @property
    def keys(self) -> dict[str, str]:
        """What each kind of condition was made with (`condition_keys`), of the first row."""
        clips = {kind: self._table[f"keys.{kind}"][0].as_py() for kind in KINDS}
        text = self._text.table["key"][int(self._text_rows[0])].as_py()
        return {kind: key for kind, key in (clips | {"text": text}).items() if key is not None}

    def index(self) -> DatasetIndex:
        """Buckets and known-variant counts for the step plan."""
        shapes = zip(*(self._table[name].to_pylist() for name in ("num_frames", "height", "width")))
        return DatasetIndex(
            buckets=tuple(Bucket(*shape) for shape in shapes),
            num_known=tuple(count or 0 for count in self._table["num_known"].to_pylist()),
        )

    def check_keys(self, expected: Mapping[str, str]) -> None:
        """Refuse to train on conditions that other weights or settings made.

        Args:
            expected: keys by kind (`condition_keys`); kinds that are left out are not compared.

        Raises:
            LatentsError: names the fields, and how to encode again.
        """
        stale = [
            kind
            for kind, key in expected.items()
            if kind != "text" and set(self._table[f"keys.{kind}"].unique().to_pylist()) - {None, key}
        ]
        for (name, _), key in self._null_keys.items():
            kind = NULL_KINDS[name]
            if kind in expected and key != expected[kind]:
                stale.append(kind)
        if stale:
            raise self._stale(stale)
        if "text" in expected:
            self._found_texts = self._find_texts(expected["text"])

    def _stale(self, kinds: Sequence[str]) -> LatentsError:
        return LatentsError(
            f"{self.root}: {', '.join(sorted(set(kinds)))} was encoded with other weights or settings than this "
            "recipe's: run wan_accel.cache with this recipe, which encodes only that again"
        )

    def check_nulls(self, *, caption_dropout: float, face_dropout: float) -> None:
        """Refuse dropouts, and clips of which nothing may be known, without the null rows that stand in for them.

        Raises:
            LatentsError: every one that is missing, and what needs it.
        """
        needs = {("empty_prompt", ""): f"data.caption_dropout={caption_dropout}"} if caption_dropout else {}
        if face_dropout:
            needs["face", ""] = f"data.face_dropout={face_dropout}"
        if self._has_known:
            for bucket in sorted(set(self.index().buckets)):
                needs["animation_known", bucket_key(*bucket)] = f"clips of {bucket_key(*bucket)}"
        missing = [f"{kind} {shape}".strip() + f" ({why})" for (kind, shape), why in needs.items()
                   if (kind, shape) not in self._null]  # fmt: skip
        if missing:
            raise LatentsError(
                f"{self.root}/null has no {'; no '.join(missing)}: run wan_accel.cache on it again, or set the dropout "
                "to 0"
            )

    @property
    def _has_known(self) -> bool:
        return self._table["keys.known"].null_count < len(self._table)

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """The denoiser's inputs for one draw, without a batch dim.

        For Animate, frame 0 of `latents` and `condition` is the reference slot.

        Raises:
            LatentsError: the draw needs a null row that was not cached, or the row's latents contradict its bucket.
        """
        row = self._clips[int(self._stored[index])]
        latents = cell_to_tensor(row["latents"])
        self._check_shape(row, index, latents)
        sample = {"text": self._text_of(index, draw)}
        if row.get("image_latents") is not None:
            sample["condition"] = join_first_frame(cell_to_tensor(row["image_latents"]))
        if row["clip_features"] is not None:
            sample["clip_features"] = cell_to_tensor(row["clip_features"])
        if row["reference_latents"] is not None:
            reference = cell_to_tensor(row["reference_latents"])
            sample |= {
                "condition": self._condition(row, draw, reference),
                "pose_latents": cell_to_tensor(row["pose_latents"]),
                "motion_vectors": self._motion_of(row, draw),
            }
            latents = torch.cat([reference, latents], dim=1)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw.noise_seed))
        return {"latents": latents, "noise": noise, **sample}

    def clip_info(self, index: int) -> ClipInfo:
        """What to call the clip of a row."""
        row = self._clips[int(self._stored[index])]
        caption = self._captions.get(row["clip_id"], row["caption"])
        return ClipInfo(clip_id=row["clip_id"], caption=caption, fps=float(row["fps"]))

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a batch with the negative prompt and, where there are faces, none: what guidance leaves.

        Raises:
            LatentsError: a null row was not cached.
        """
        batch = len(inputs["text"])
        changed = {"text": self._null_of("negative_prompt", "").expand(batch, -1, -1)}
        if "motion_vectors" in inputs:
            changed["motion_vectors"] = self._null_of("face", "").expand(inputs["motion_vectors"].shape).clone()
        return {**inputs, **changed}

    def _check_shape(self, row: Row, index: int, latents: Tensor) -> None:
        if self.variant is None:
            return
        frames, height, width = row["num_frames"], row["height"], row["width"]
        (stride_t, stride_h, stride_w), channels = self.variant.vae.stride, self.variant.vae.latent_channels
        expected = (channels, (frames - 1) // stride_t + 1, height // stride_h, width // stride_w)
        if tuple(latents.shape) != expected:
            raise LatentsError(
                f"{self.root}: clip {row['clip_id']} (row {index}) has latents {tuple(latents.shape)}, but its bucket "
                f"of {frames} frames of {height}x{width} needs {expected}: its row was written by something else; "
                "encode into a new data.latents folder"
            )

    def _text_of(self, index: int, draw: SampleDraw) -> Tensor:
        if draw.drop_caption:
            return self._null_of("empty_prompt", "")
        return cell_to_tensor(self._text[int(self._text_rows[index])]["embeddings"])

    def _motion_of(self, row: Row, draw: SampleDraw) -> Tensor:
        motion = cell_to_tensor(row["motion_vectors"])
        return self._null_of("face", "").expand(len(motion), -1).clone() if draw.drop_face else motion

    def _condition(self, row: Row, draw: SampleDraw, reference: Tensor) -> Tensor:
        shape = row["num_frames"], row["height"], row["width"]
        known = row.item("known", draw.known) if draw.known != NO_KNOWN else None
        if known is None or known["latents"] is None:
            latents = self._null_of("animation_known", bucket_key(*shape))
            mask = latents.new_zeros(NUM_MASK_CHANNELS, *latents.shape[1:])
            return join_condition(reference, mask, latents)
        latents = cell_to_tensor(known["latents"])
        mask_shape = (NUM_MASK_CHANNELS, *latents.shape[1:])
        bits = np.unpackbits(np.frombuffer(known["mask_bits"], dtype=np.uint8), count=int(np.prod(mask_shape)))
        return join_condition(reference, torch.from_numpy(bits).reshape(mask_shape), latents)

    def _null_of(self, kind: str, shape: str) -> Tensor:
        if (kind, shape) not in self._null:
            raise LatentsError(
                f"{self.root}/null has no {kind} {shape}".rstrip() + ": run wan_accel.cache on it again, or set the "
                "dropout that needs it to 0"
            )
        return self._null[kind, shape]
