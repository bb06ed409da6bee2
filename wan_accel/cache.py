"""Encode a clips dataset once: `accelerate launch [--config_file CONFIG] -m wan_accel.cache RECIPE [key=value ...]`.

Captions first, each distinct one once; then clips, which ranks claim one by one without talking to each other.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from wan_accel.data import store
from wan_accel.data.clips import Clip, load_clip
from wan_accel.data.latents import bucket_key, tensor_to_cell
from wan_accel.data.schema import (
    CLIPS_SCHEMA,
    LATENTS_SCHEMA,
    check_schema,
    latents_features,
    null_features,
    text_features,
)
from wan_accel.data.skeleton import draw_poses
from wan_accel.models.conditioning.animate import (
    KnownVariant,
    draw_known_variant,
    grow_mask,
    known_mask,
    known_pixels,
    to_pixels,
)
from wan_accel.models.conditioning.text import NULL_PROMPTS, caption_id, encode_captions
from wan_accel.models.denoiser import encode_motion
from wan_accel.models.encoders import (
    file_identity,
    load_motion_encoder,
    load_text_encoder,
    load_vae,
)
from wan_accel.models.encoders import (
    load_clip as load_image_encoder,
)
from wan_accel.models.loading import MOTION_ENCODER, CheckpointReader, dit_folder
from wan_accel.models.variants import CLIP_FILE, FACE_SIZE, TEXT_ENCODER_FILE, Variant, get_variant
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe

logger = logging.getLogger("wan_accel")
STORED = torch.bfloat16
GIB = 2**30
# VAE 2.1, one H100: 81 frames of 480 x 832 in 1.34 s. Only for the estimate of --dry-run.
_SECONDS_PER_PIXEL = 1.34 / (81 * 480 * 832)


def main(argv: list[str] | None = None) -> int:
    """Encode; returns the exit code (2 for input that cannot be used)."""
    parser = argparse.ArgumentParser(description="Encode a clips dataset into a latents folder.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and stop")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        cache = Cache(load_recipe(arguments.recipe, arguments.overrides))
        cache.check_disk(report=arguments.dry_run)
        if not arguments.dry_run:
            cache.run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def condition_keys(variant: Variant, checkpoint: Path, settings: dict[str, Any]) -> dict[str, str]:
    """What each kind of condition depends on, hashed: schema, the encoder's weights, settings.

    A field whose encoder file is not in `checkpoint` (an exported DiT alone) is left out.
    """
    encoders: dict[str, Path] = {
        "text": checkpoint / TEXT_ENCODER_FILE,
        "video": checkpoint / variant.vae.file,
    }
    if variant.has_animate_adapter:
        vae = checkpoint / variant.vae.file
        encoders |= {"pose": vae, "known": vae, "reference": checkpoint / CLIP_FILE}
    keys = {}
    for name, path in encoders.items():
        if path.is_file():
            relevant = settings if name == "known" else {}
            keys[name] = _hash([LATENTS_SCHEMA, variant.name, name, file_identity(path), relevant])
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


def known_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings that the known variants depend on."""
    return {"known_variants": recipe.cache.known_variants, "seed": int(recipe.training.get("seed", 42))}


class Cache:
    """One run of the cache over a clips dataset.

    Raises:
        ValueError: clips of another schema or for driving only, a checkpoint without a file, an output of another run.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.data.clips is None:
            raise ValueError("data.clips is missing: the clips dataset to encode")
        self.state = PartialState()
        self.variant = get_variant(recipe.variant)
        self.checkpoint = Path(recipe.model.checkpoint)
        self.root = Path(recipe.data.latents)
        self.settings = known_settings(recipe)
        self.clips = store.load(Path(recipe.data.clips), CLIPS_SCHEMA)
        self._refuse_driving_clips(recipe.data.clips)
        # Encoders are opened first: a missing file must not leave an empty output behind.
        self.keys = condition_keys(self.variant, self.checkpoint, self.settings)
        self.claimed = {
            "variant": self.variant.name,
            "keys": self.keys,
            "clips": _clips_settings(Path(recipe.data.clips)),
        }

    def _refuse_driving_clips(self, path: str) -> None:
        if not self.variant.has_animate_adapter:
            return
        if "purpose" not in self.clips.column_names:
            raise ValueError(f"{path} has no Animate columns: make it with `wan-preprocess animate --purpose train`")
        if "drive" in set(self.clips.select_columns(["purpose"])["purpose"]):
            raise ValueError(
                f"{path} holds clips made with --purpose drive (another character's picture, retargeted poses): their "
                "video does not show what the pose says. Make training clips with --purpose train"
            )

    def check_disk(self, *, report: bool) -> None:
        """Compare the bytes that the run will write with the free space; print them if asked.

        Raises:
            ValueError: the disk is too small.
        """
        sizes = self._estimate()
        parent = next(p for p in (self.root, *self.root.resolve().parents) if p.exists())
        free, total = shutil.disk_usage(parent).free, sum(sizes.values())
        if report and self.state.is_main_process:
            for name, size in sizes.items():
                print(f"{size / GIB:10.3f} GiB  {name}")
            print(
                f"{total / GIB:10.3f} GiB  in all ({free / GIB:.1f} GiB free); {self._gpu_hours():.2f} GPU hours (one H100, VAE only)"
            )
        if total > free:
            raise ValueError(
                f"{self.root} needs {total / GIB:.2f} GiB but {free / GIB:.2f} GiB are free: free some, or use another disk"
            )

    def _estimate(self) -> dict[str, int]:
        """Bytes by column over all clips."""
        columns = self.clips.select_columns(["num_frames", "height", "width"])[:]
        channels, (stride_t, stride_h, stride_w) = self.variant.vae.latent_channels, self.variant.vae.stride
        sizes = dict.fromkeys(("latents",), 0)
        for frames, height, width in zip(columns["num_frames"], columns["height"], columns["width"]):
            area = (height // stride_h) * (width // stride_w)
            latent = ((frames - 1) // stride_t + 1) * area * channels * STORED.itemsize
            sizes["latents"] += latent
            if self.variant.has_animate_adapter:
                sizes["pose_latents"] = sizes.get("pose_latents", 0) + latent
                sizes["known"] = sizes.get("known", 0) + latent * self.settings["known_variants"]
                sizes["reference"] = sizes.get("reference", 0) + area * channels * 2 + 257 * 1280 * 2
                sizes["motion_vectors"] = sizes.get("motion_vectors", 0) + frames * 512 * 4
        return sizes

    def _gpu_hours(self) -> float:
        columns = self.clips.select_columns(["num_frames", "height", "width"])[:]
        pixels = sum(f * h * w for f, h, w in zip(columns["num_frames"], columns["height"], columns["width"]))
        passes = 2 + self.settings["known_variants"] if self.variant.has_animate_adapter else 1
        return pixels * passes * _SECONDS_PER_PIXEL / 3600

    def run(self) -> None:
        """Encode what is not there yet. Every rank calls it."""
        if self.state.is_main_process:
            for part in ("clips", "text", "null"):
                store.claim_output(self.root / part, schema=LATENTS_SCHEMA, settings=self.claimed)
            shutil.rmtree(self.root / "claims", ignore_errors=True)  # of a run that was killed
            (self.root / "claims").mkdir()
        self.state.wait_for_everyone()
        self._encode_texts()
        self._encode_clips()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            shutil.rmtree(self.root / "claims", ignore_errors=True)
            self._encode_nulls()
            for part, features in self._features.items():
                store.refresh_state(self.root / part, features)
            self._summarise()

    @property
    def _features(self) -> dict[str, Any]:
        return {"clips": latents_features(), "text": text_features(), "null": null_features()}

    def _writer(self, part: str) -> store.PartWriter:
        return store.PartWriter(
            self.root / part, writer=f"rank{self.state.process_index}", features=self._features[part]
        )

    def _encode_texts(self) -> None:
        captions = sorted(
            {row or "" for row in self.clips.select_columns(["caption"])["caption"]} | {*NULL_PROMPTS.values()}
        )
        done = store.ids(self.root / "text", "caption_id")
        todo = [caption for caption in captions if caption_id(caption) not in done]
        mine = todo[self.state.process_index :: self.state.num_processes]
        if not mine:
            return
        encoder = load_text_encoder(self.checkpoint, torch_dtype=STORED, device=self.state.device)
        with self._writer("text") as writer:
            for item in tqdm(
                encode_captions(encoder, mine), "captions", len(mine), disable=not self.state.is_main_process
            ):
                writer.write(
                    {
                        "schema": LATENTS_SCHEMA, "caption_id": item.caption_id, "caption": item.caption,
                        "key": self.keys.get("text"), "embeddings": tensor_to_cell(item.embeddings.to(STORED)),
                    }
                )  # fmt: skip

    def _encode_clips(self) -> None:
        done = store.ids(self.root / "clips", "clip_id")
        names = self.clips.select_columns(["clip_id"])["clip_id"]
        todo = [row for row, name in enumerate(names) if name not in done]
        if not todo:
            return
        encoder = ClipEncoder(self.variant, self.checkpoint, self.settings, self.state.device)
        bar = tqdm(total=len(todo), desc="clips", disable=not self.state.is_main_process)
        with self._writer("clips") as writer:
            for row in self._claim(todo):
                try:
                    writer.write({**self._describe(row), **encoder.encode(load_clip(self.clips[row]), self.clips[row])})
                except ValueError as error:
                    self._reject(names[row], str(error))
                bar.n = len(list((self.root / "claims").iterdir()))
                bar.refresh()
        bar.close()

    def _claim(self, rows: list[int]) -> Iterator[int]:
        """Yield the rows that this rank gets; a claim file made by `O_EXCL` belongs to one rank."""
        for row in rows:
            try:
                os.close(os.open(self.root / "claims" / str(row), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield row

    def _describe(self, row: int) -> dict[str, Any]:
        clip = self.clips[row]
        names = ("clip_id", "num_frames", "height", "width", "fps")
        caption = clip["caption"] or ""
        return {
            "schema": LATENTS_SCHEMA, "source_sha256": clip["source"]["sha256"], "caption": caption,
            "caption_id": caption_id(caption), "modes": clip.get("modes") or [], "keys": self.keys,
            **{name: clip[name] for name in names},
        }  # fmt: skip

    def _reject(self, clip_id: str, reason: str) -> None:
        logger.warning("clip %s is left out: %s", clip_id, reason)
        with (self.root / "rejected.jsonl").open("a") as file:
            file.write(json.dumps({"clip_id": clip_id, "reason": reason}) + "\n")

    def _encode_nulls(self) -> None:
        """Empty and negative prompt, all -1 face, and the constant known latents of each shape."""
        with_keys = store.parts(self.root / "null")
        done = set()
        for part in with_keys:
            done |= {(row["kind"], row["shape"]) for row in _rows(part)}
        rows = {key: tensor for key, tensor in self._nulls(done) if key not in done}
        if not rows:
            return
        with self._writer("null") as writer:
            for (kind, shape), tensor in rows.items():
                writer.write({"schema": LATENTS_SCHEMA, "kind": kind, "shape": shape, "tensor": tensor_to_cell(tensor)})

    def _nulls(self, done: set[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], Tensor]]:
        if any((kind, "") not in done for kind in NULL_PROMPTS):
            encoder = load_text_encoder(self.checkpoint, torch_dtype=STORED, device=self.state.device)
            for kind, prompt in NULL_PROMPTS.items():
                yield (kind, ""), encoder.encode([prompt])[0].to(STORED)
        if not self.variant.has_animate_adapter:
            return
        columns = self.clips.select_columns(["num_frames", "height", "width"])[:]
        shapes = sorted(set(zip(columns["num_frames"], columns["height"], columns["width"])))
        wanted = [shape for shape in shapes if ("animation_known", bucket_key(*shape)) not in done]
        if wanted or ("face", "") not in done:
            encoder = ClipEncoder(self.variant, self.checkpoint, self.settings, self.state.device)
            yield ("face", ""), encoder.motion(torch.full((1, 3, 1, FACE_SIZE, FACE_SIZE), -1.0))
            for shape in wanted:
                yield ("animation_known", bucket_key(*shape)), encoder.video(torch.zeros(3, *shape))

    def _summarise(self) -> None:
        done = len(store.ids(self.root / "clips", "clip_id"))
        logger.info("%s: %d of %d clips encoded", self.root, done, len(self.clips))
        if done == 0:
            raise ValueError(f"no clip could be encoded; the reasons are in {self.root / 'rejected.jsonl'}")


def _rows(part: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(part)) as source:
        for batch in pa.ipc.open_stream(source):
            yield from batch.select(["kind", "shape"]).to_pylist()


def _clips_settings(path: Path) -> str:
    """The settings hash of the run that made the clips, so that clips made anew are not taken for the old ones."""
    file = path / store.RUN_FILE
    if not file.is_file():
        return ""
    content = json.loads(file.read_text())
    check_schema(content.get("schema"), CLIPS_SCHEMA, str(path))
    return content["settings_hash"]


class ClipEncoder:
    """The networks that one rank needs for clips, and what they make of one."""

    def __init__(self, variant: Variant, checkpoint: Path, settings: dict[str, Any], device: torch.device) -> None:
        self.variant = variant
        self.settings = settings
        self.device = device
        self.vae = load_vae(checkpoint, variant, device=device)
        if variant.has_animate_adapter:
            self.clip = load_image_encoder(checkpoint, device=device)
            self.motion_encoder = load_motion_encoder(checkpoint, variant, device=device)

    def video(self, pixels: Tensor) -> Tensor:
        """(3, T, H, W) in [-1, 1] -> latents (C, F, h, w), stored dtype, CPU."""
        return self.vae.encode(pixels[None].to(self.device))[0].to(STORED).cpu()

    @torch.no_grad()
    def motion(self, faces: Tensor) -> Tensor:
        """(1, 3, T, 512, 512) in [-1, 1] -> motion vectors (T, motion_dim) fp32, CPU."""
        return encode_motion(self.motion_encoder, faces.to(self.device))[0].float().cpu()

    def encode(self, clip: Clip, row: dict[str, Any]) -> dict[str, Any]:
        """The tensor columns of a clip.

        Raises:
            ValueError: the clip lacks what the variant needs.
        """
        frames = to_pixels(clip.frames_rgb)
        latents = self.video(frames)
        encoded: dict[str, Any] = {"latents": tensor_to_cell(latents), "known": [], "num_known": 0}
        if not self.variant.has_animate_adapter:
            return encoded
        for name in ("reference_rgb", "pose_keypoints", "faces_rgb"):
            if getattr(clip, name) is None:
                raise ValueError(
                    f"clip {clip.clip_id} has no {name.removesuffix('_rgb')}, which {self.variant.name} needs"
                )
        assert clip.reference_rgb is not None and clip.pose_keypoints is not None and clip.faces_rgb is not None
        reference = to_pixels(clip.reference_rgb[None])
        if reference.shape[2:] != frames.shape[2:] or clip.canvas_hw != tuple(frames.shape[2:]):
            raise ValueError(
                f"clip {clip.clip_id}: reference {tuple(reference.shape[2:])} and video {tuple(frames.shape[2:])} differ in size"
            )
        pose = to_pixels(draw_poses(clip.pose_keypoints, clip.canvas_hw))
        known = self._known(clip, frames, list(row["modes"]), latents)
        return encoded | {
            "reference_latents": tensor_to_cell(self.video(reference)),
            "pose_latents": tensor_to_cell(self.video(pose)),
            "clip_features": tensor_to_cell(self.clip.encode(reference[:, 0][None].to(self.device))[0].to(STORED)),
            "motion_vectors": tensor_to_cell(self.motion(to_pixels(clip.faces_rgb)[None])),
            "known": known,
            "num_known": len(known),
        }

    def _known(self, clip: Clip, frames: Tensor, modes: list[str], latents: Tensor) -> list[dict[str, Any]]:
        """The clip's known variants, drawn from (seed, clip, number); plain animation stores no tensors."""
        if clip.mask is None:
            modes = [mode for mode in modes if mode != "replacement"]
        variants = []
        for number in range(self.settings["known_variants"]):
            entropy = [self.settings["seed"], number, xxhash.xxh64(clip.clip_id.encode()).intdigest()]
            variant = draw_known_variant(np.random.default_rng(entropy), modes, len(clip.frames_rgb))
            variants.append({**asdict(variant), **self._known_tensors(clip, frames, variant, latents)})
        return variants

    def _known_tensors(self, clip: Clip, frames: Tensor, variant: KnownVariant, latents: Tensor) -> dict[str, Any]:
        if variant.is_plain:
            return {"latents": None, "mask_bits": None}
        grown = grow_mask(clip.mask, variant) if variant.mode == "replacement" and clip.mask is not None else None
        mask = known_mask(grown, variant, frames.shape[1], (latents.shape[2], latents.shape[3]))
        return {
            "latents": tensor_to_cell(self.video(known_pixels(frames, grown, variant))),
            "mask_bits": np.packbits(mask.numpy().astype(bool)).tobytes(),
        }


if __name__ == "__main__":
    sys.exit(main())
