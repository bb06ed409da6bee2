"""The encoder files of a checkpoint: which ones a variant needs, whether they are whole, which weights they hold."""

import json
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from wan_accel.data.schema import LATENTS_SCHEMA
from wan_accel.models.encoder_layouts import read_diffusers_encoder
from wan_accel.models.layouts import TOKENIZER, encoder_folder, is_diffusers
from wan_accel.models.loading import MOTION_ENCODER, CheckpointError, CheckpointReader, dit_folder
from wan_accel.models.variants import CLIP_FILE, TEXT_ENCODER_FILE, TOKENIZER_FOLDER, Variant

TOKENIZER_FILE = f"{TOKENIZER_FOLDER}/tokenizer.json"
_IDENTITY_BLOCKS, _IDENTITY_BLOCK_BYTES = 64, 1 << 16
_PURPOSES = {
    TEXT_ENCODER_FILE: "encodes captions",
    f"{encoder_folder(TEXT_ENCODER_FILE)}/": "encodes captions",
    TOKENIZER_FILE: "splits captions into tokens",
    f"{TOKENIZER}/": "splits captions into tokens",
    CLIP_FILE: "encodes reference pictures",
    f"{encoder_folder(CLIP_FILE)}/": "encodes reference pictures",
}


def encoder_files(variant: Variant, checkpoint: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Which files, relative to the checkpoint, each kind of condition is made with (faces: see `condition_keys`).

    Args:
        variant: whose conditions.
        checkpoint: to name the files of its layout; those of the original one by default.
    """
    if checkpoint is not None and is_diffusers(checkpoint):
        return _diffusers_files(variant, checkpoint)
    vae = variant.vae.file
    files: dict[str, tuple[str, ...]] = {"text": (TEXT_ENCODER_FILE, TOKENIZER_FILE), "video": (vae,)}
    if variant.has_animate_adapter:
        files |= {"pose": (vae,), "known": (vae,), "reference": (vae, CLIP_FILE)}
    if "first_frame" in variant.conditioning:
        files["image"] = (vae, CLIP_FILE) if "clip" in variant.conditioning else (vae,)
    return files


def tokenizer_folder(checkpoint: Path) -> Path:
    return checkpoint / (TOKENIZER if is_diffusers(checkpoint) else TOKENIZER_FOLDER)


def _diffusers_files(variant: Variant, checkpoint: Path) -> dict[str, tuple[str, ...]]:
    """The same kinds as in the original layout; an encoder is every safetensors file of its folder."""

    def names(file: str) -> tuple[str, ...]:
        if file == TOKENIZER_FILE:
            return (f"{TOKENIZER}/{Path(TOKENIZER_FILE).name}",)
        folder = encoder_folder(file)
        found = sorted(f"{folder}/{path.name}" for path in (checkpoint / folder).glob("*.safetensors"))
        return tuple(found) or (f"{folder}/*.safetensors",)

    original = encoder_files(variant)
    return {kind: tuple(name for file in files for name in names(file)) for kind, files in original.items()}


def read_encoder(file: Path) -> dict[str, Tensor]:
    """The tensors of one of Wan's own encoder files, or of the folder that a diffusers repository has in its place.

    Raises:
        CheckpointError: neither is there, or it is damaged.
    """
    if not file.exists() and is_diffusers(file.parent):
        return read_diffusers_encoder(file.with_name(encoder_folder(file.name)))
    return read_pth(file)


def check_encoder_files(checkpoint: Path, variant: Variant, *, kinds: Collection[str] | None = None) -> None:
    """Open every file that encoding some kinds of conditions needs, all by default, without reading tensors.

    Raises:
        CheckpointError: all files that are missing, or the first that is damaged; what each is for.
    """
    files = encoder_files(variant, checkpoint)
    names = sorted({name for kind in (files if kinds is None else kinds) for name in files[kind]})
    if variant.has_animate_adapter and kinds is None:
        CheckpointReader(dit_folder(checkpoint, variant, variant.experts[0].name))  # holds the motion encoder
    elif not checkpoint.is_dir():
        dit_folder(checkpoint, variant, variant.experts[0].name)  # says how to get a checkpoint
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        listed = "; ".join(f"{name} ({_purpose(name)})" for name in missing)
        raise CheckpointError(
            f"{checkpoint} does not have {listed}: download {variant.hub_id} there again, or set model.checkpoint to a "
            "whole checkpoint"
        )
    for name in names:
        if name.endswith(".pth"):
            read_pth(checkpoint / name)
    for folder in sorted({Path(name).parent for name in names if name.endswith(".safetensors")}):
        CheckpointReader(checkpoint / folder)


def _purpose(name: str) -> str:
    return next((what for part, what in _PURPOSES.items() if name.startswith(part)), "encodes videos")


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped rather than read.

    Raises:
        CheckpointError: it does not exist, is cut short, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: download {path.name} of the checkpoint, or set another folder")
    try:
        # Only zip archives can be mapped; a file of the format before them is read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or cut short ({reason}): download it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds no table of tensors: download it again")
    return state


def condition_keys(variant: Variant, checkpoint: Path, *, known_variants: int) -> dict[str, str]:
    """What each kind of condition depends on, hashed: schema, the encoders' weights, settings.

    Two runs with the same keys make the same tensors of the same clips. A kind whose files are not in `checkpoint`
    (an exported DiT alone) is left out.
    """
    keys = {}
    for kind, names in encoder_files(variant, checkpoint).items():
        paths = [checkpoint / name for name in names]
        if all(path.is_file() for path in paths):
            settings = {"known_variants": known_variants} if kind == "known" else {}
            keys[kind] = _hash([LATENTS_SCHEMA, variant.name, kind, [file_identity(path) for path in paths], settings])
    if variant.has_animate_adapter:
        keys["face"] = _hash([LATENTS_SCHEMA, variant.name, "face", _motion_identity(checkpoint, variant)])
    return keys


def _hash(content: Any) -> str:
    return xxhash.xxh64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _motion_identity(checkpoint: Path, variant: Variant) -> str:
    """Hash of the motion encoder's weights, which live among the DiT's."""
    reader = CheckpointReader(dit_folder(checkpoint, variant, variant.experts[0].name))
    digest = xxhash.xxh64()
    for name in sorted(reader.shapes):
        if name.startswith(MOTION_ENCODER):
            digest.update(reader.read(name).float().numpy().tobytes())
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Hash a file's size and 64 blocks spread over it: which weights these are, without reading 11 GB."""
    size = path.stat().st_size
    digest = xxhash.xxh64(size.to_bytes(8, "little"))
    last = max(size - _IDENTITY_BLOCK_BYTES, 0)
    with path.open("rb") as file:
        for offset in sorted({last * block // (_IDENTITY_BLOCKS - 1) for block in range(_IDENTITY_BLOCKS)}):
            file.seek(offset)
            digest.update(file.read(_IDENTITY_BLOCK_BYTES))
    return digest.hexdigest()
