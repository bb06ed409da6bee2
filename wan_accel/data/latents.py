"""Cached conditions: tensors in cells of a row, and the dataset that training draws from.

<root>/clips   a row a clip: latents and conditions
<root>/text    a row a distinct caption
<root>/null    what dropout and plain animation need
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_accel.data import store
from wan_accel.data.schema import LATENTS_SCHEMA
from wan_accel.models.conditioning.animate import NUM_MASK_CHANNELS, join_condition
from wan_accel.models.conditioning.image import join_first_frame
from wan_accel.step_plan import NO_KNOWN, Bucket, DatasetIndex, SampleDraw

_INDEX_COLUMNS = ["num_frames", "height", "width", "num_known", "source_sha256", "caption_id", "clip_id"]
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


class LatentsDataset:
    """The latents folder that `wan_accel.cache` writes, as a source of training samples.

    Args:
        root: the folder.

    Raises:
        StoreError, SchemaError: it is not there, damaged, or of another version.
        LatentsError: it has clips but not their texts.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._clips = store.load(self.root / "clips", LATENTS_SCHEMA)
        self._text = store.load(self.root / "text", LATENTS_SCHEMA)
        columns = self._clips.select_columns(_INDEX_COLUMNS)[:]
        self._columns: dict[str, list[Any]] = columns
        self._text_rows = {
            name: row for row, name in enumerate(self._text.select_columns(["caption_id"])["caption_id"])
        }
        missing = set(columns["caption_id"]) - set(self._text_rows)
        if missing:
            raise LatentsError(f"{self.root} has no text for {len(missing)} captions: run wan_accel.cache on it again")
        self._null = self._load_null()

    def _load_null(self) -> dict[tuple[str, str], Tensor]:
        rows = store.load(self.root / "null", LATENTS_SCHEMA)
        return {(row["kind"], row["shape"]): cell_to_tensor(row["tensor"]) for row in rows}

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def group_ids(self) -> list[str]:
        """The source of every row: clips of one source stay on one side of a validation split."""
        return list(self._columns["source_sha256"])

    @property
    def clip_ids(self) -> list[str]:
        return list(self._columns["clip_id"])

    @property
    def keys(self) -> dict[str, str]:
        """What each kind of condition was made with (`condition_keys`); the same for all rows of a folder."""
        return {name: key for name, key in self._clips.select_columns(["keys"])[0]["keys"].items() if key is not None}

    def index(self) -> DatasetIndex:
        """Buckets and known-variant counts for the step plan."""
        shapes = zip(self._columns["num_frames"], self._columns["height"], self._columns["width"])
        return DatasetIndex(
            buckets=tuple(Bucket(*map(int, shape)) for shape in shapes),
            num_known=tuple(int(count or 0) for count in self._columns["num_known"]),
        )

    def check_keys(self, expected: Mapping[str, str]) -> None:
        """Refuse to train on conditions that other weights or settings made.

        Raises:
            LatentsError: names the fields, and how to encode again.
        """
        found = self._clips.select_columns(["keys"])["keys"]
        stale = sorted(name for name, key in expected.items() if any(row[name] not in (None, key) for row in found))
        if stale:
            raise LatentsError(
                f"{self.root}: {', '.join(stale)} was encoded with other weights or settings than this recipe's: run "
                "wan_accel.cache with this recipe into a new data.latents folder"
            )

    def sample(self, index: int, draw: SampleDraw) -> dict[str, Tensor]:
        """The denoiser's inputs for one draw, without a batch dim.

        For Animate, frame 0 of `latents` and `condition` is the reference slot.

        Raises:
            LatentsError: the draw needs a null row that was not cached.
        """
        # As Python objects: the numpy format of datasets 5.2 strips zero bytes from the end of binary columns.
        row = self._clips[index]
        latents = cell_to_tensor(row["latents"])
        sample = {"text": self._text_of(row, draw)}
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
        row = self._clips.select_columns(["clip_id", "caption", "fps"])[index]
        return ClipInfo(clip_id=row["clip_id"], caption=row["caption"], fps=float(row["fps"]))

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

    def _text_of(self, row: Mapping[str, Any], draw: SampleDraw) -> Tensor:
        if draw.drop_caption:
            return self._null_of("empty_prompt", "")
        return cell_to_tensor(self._text[self._text_rows[row["caption_id"]]]["embeddings"])

    def _motion_of(self, row: Mapping[str, Any], draw: SampleDraw) -> Tensor:
        motion = cell_to_tensor(row["motion_vectors"])
        return self._null_of("face", "").expand(len(motion), -1).clone() if draw.drop_face else motion

    def _condition(self, row: Mapping[str, Any], draw: SampleDraw, reference: Tensor) -> Tensor:
        shape = row["num_frames"], row["height"], row["width"]
        known = row["known"][draw.known] if draw.known != NO_KNOWN else None
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
