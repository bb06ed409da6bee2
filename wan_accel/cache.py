"""Encode a clips dataset once: `accelerate launch [--config_file CONFIG] -m wan_accel.cache RECIPE [key=value ...]`.

Captions first, each distinct one once; then clips, which ranks claim one by one without talking to each other.
"""

import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.latents import bucket_key, cell_to_tensor, tensor_to_cell
from wan_accel.data.schema import CLIPS_SCHEMA, LATENTS_SCHEMA, latents_features, null_features, text_features
from wan_accel.models.checkpoint_files import check_encoder_files, condition_keys
from wan_accel.models.conditioning.clips import STORED, ClipEncoder
from wan_accel.models.conditioning.estimate import bytes_by_column, videos_per_clip
from wan_accel.models.conditioning.text import NULL_PROMPTS, caption_id, encode_captions
from wan_accel.models.encoders import load_text_encoder
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.variants import TEXT_LENGTH, get_variant
from wan_accel.recipe.check import check
from wan_accel.recipe.commandline import log_on_main_rank, parse_overrides, recipe_parser
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe

logger = logging.getLogger("wan_accel")
GIB = 2**30
# VAE 2.1, one H100: 81 frames of 480 x 832 in 1.34 s. Only for the estimate of --dry-run.
_SECONDS_PER_PIXEL = 1.34 / (81 * 480 * 832)
_FEATURES = {"clips": latents_features, "text": text_features, "null": null_features}
Shape = tuple[int, int, int]  # frames, height, width


def main(argv: list[str] | None = None) -> int:
    """Encode; returns the exit code (2 for input that cannot be used)."""
    parser = recipe_parser("Encode a clips dataset into a latents folder.")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and stop")
    arguments = parse_overrides(parser, argv)
    log_on_main_rank()
    try:
        cache = Cache(load_recipe(arguments.recipe, arguments.overrides))
        if arguments.dry_run and cache.state.is_main_process:
            print(cache.describe())
        cache.check_disk()
        if not arguments.dry_run:
            cache.run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


class Cache:
    """One run of the cache over a clips dataset. Making one reads and checks, and writes nothing.

    Raises:
        ValueError: a recipe with problems, clips of another schema or for driving only, a checkpoint without a file.
    """

    def __init__(self, recipe: Recipe) -> None:
        problems = check(recipe)
        if recipe.data.clips is None:
            problems.append("data.clips is missing: the clips dataset to encode")
        if problems:
            raise ValueError("\n".join(problems))
        assert recipe.data.clips is not None
        # Without a GPU accelerate only starts processes' group if told so. Ranks finish far apart: wait a day.
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        self.variant = get_variant(recipe.variant)
        self.checkpoint = resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
        self.root = Path(recipe.data.latents)
        self.known_variants = recipe.cache.known_variants
        self.clips = store.load(Path(recipe.data.clips), CLIPS_SCHEMA)
        self._refuse_driving_clips(recipe.data.clips)
        check_encoder_files(self.checkpoint, self.variant)
        self.keys = condition_keys(self.variant, self.checkpoint, known_variants=self.known_variants)
        self.settings = {
            "variant": self.variant.name,
            "known_variants": self.known_variants,
            "clips": _clips_settings(Path(recipe.data.clips)),
            **{f"key of {kind}": key for kind, key in self.keys.items()},
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

    def describe(self) -> str:
        """Bytes that are still to be written, by column, and what encoding them costs."""
        sizes = self._estimate()
        lines = [f"{size / GIB:10.3f} GiB  {name}" for name, size in sizes.items()]
        lines.append(f"{sum(sizes.values()) / GIB:10.3f} GiB  in all ({self._free_bytes() / GIB:.1f} GiB free)")
        lines.append(f"{self._gpu_hours():10.3f} GPU hours of one H100 (videos only)")
        return "\n".join(lines)

    def check_disk(self) -> None:
        """Compare the bytes that are still to be written with the free space.

        Raises:
            ValueError: the disk is too small.
        """
        total, free = sum(self._estimate().values()), self._free_bytes()
        if total > free:
            raise ValueError(
                f"data.latents={self.root} needs {total / GIB:.2f} GiB but {free / GIB:.2f} GiB are free: free "
                "some, or use another disk"
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(next(p for p in (self.root, *self.root.resolve().parents) if p.exists())).free

    def _todo(self) -> list[int]:
        """Rows of the clips dataset that no finished part holds."""
        done = store.ids(self.root / "clips", "clip_id")
        return [row for row, name in enumerate(self.clips.select_columns(["clip_id"])["clip_id"]) if name not in done]

    def _shapes(self, rows: list[int]) -> list[Shape]:
        columns = self.clips.select_columns(["num_frames", "height", "width"]).select(rows)[:]
        return list(zip(columns["num_frames"], columns["height"], columns["width"]))

    def _captions_todo(self) -> list[str]:
        """Every distinct caption, and the prompts that stand for none, that no finished part holds."""
        captions = {caption or "" for caption in self.clips.select_columns(["caption"])["caption"]}
        done = store.ids(self.root / "text", "caption_id")
        return sorted(caption for caption in captions | {*NULL_PROMPTS.values()} if caption_id(caption) not in done)

    def _estimate(self) -> dict[str, int]:
        """Bytes by column over what is to do; of texts only about, at a token for 3 bytes."""
        tokens = sum(min(len(caption.encode()) // 3 + 1, TEXT_LENGTH) for caption in self._captions_todo())
        sizes = Counter({"text (about)": tokens * self.variant.dit.text_dim * STORED.itemsize})
        for shape in self._shapes(self._todo()):
            sizes.update(bytes_by_column(self.variant, shape, known_variants=self.known_variants))
        return dict(sizes)

    def _gpu_hours(self) -> float:
        pixels = sum(frames * height * width for frames, height, width in self._shapes(self._todo()))
        videos = videos_per_clip(self.variant, known_variants=self.known_variants)
        return pixels * videos * _SECONDS_PER_PIXEL / 3600

    def run(self) -> None:
        """Encode what is not there yet. Every rank calls it.

        Raises:
            ValueError: the output folder is another run's, the disk is full, or no clip could be encoded.
        """
        self._claim_output()
        captions = self._captions_todo()
        self.state.wait_for_everyone()  # all ranks have the same list before one of them shortens it
        self._encode_texts(captions)
        self._encode_clips()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            shutil.rmtree(self._claims)
            for part, features in _FEATURES.items():
                store.refresh_state(self.root / part, features())
            self._encode_nulls()
        self.state.wait_for_everyone()
        self._summarise()

    def _claim_output(self) -> None:
        """Check on every rank, so that every rank stops with the reason; the main one then clears the way."""
        if (self.root / store.RUN_FILE).is_file():
            raise ValueError(f"data.latents={self.root} is itself a dataset of wan-accel: give another folder")
        for part in _FEATURES:
            store.claim_output(self.root / part, schema=LATENTS_SCHEMA, settings=self.settings)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            shutil.rmtree(self._claims, ignore_errors=True)  # of a run that was killed
            self._claims.mkdir()
            self._rejected.unlink(missing_ok=True)  # they are tried again
        self.state.wait_for_everyone()

    @property
    def _claims(self) -> Path:
        """Inside a folder that is surely ours, since it is removed."""
        return self.root / "clips" / "claims"

    @property
    def _rejected(self) -> Path:
        return self.root / "rejected.jsonl"

    def _writer(self, part: str) -> store.PartWriter:
        name = f"rank{self.state.process_index}"
        return store.PartWriter(self.root / part, writer=name, features=_FEATURES[part]())

    def _encode_texts(self, captions: list[str]) -> None:
        mine = captions[self.state.process_index :: self.state.num_processes]
        if not mine:
            return
        encoder = load_text_encoder(self.checkpoint, torch_dtype=STORED, device=self.state.device)
        encoded = tqdm(encode_captions(encoder, mine), "captions", len(mine), disable=not self.state.is_main_process)
        with self._writer("text") as writer:
            for item in encoded:
                writer.write(
                    {
                        "schema": LATENTS_SCHEMA, "caption_id": item.caption_id, "caption": item.caption,
                        "key": self.keys["text"], "embeddings": tensor_to_cell(item.embeddings.to(STORED)),
                    }
                )  # fmt: skip

    def _encode_clips(self) -> None:
        todo = self._todo()
        if not todo:
            return
        encoder = self._clip_encoder()
        bar = tqdm(total=len(todo), desc="clips", disable=not self.state.is_main_process)
        with self._writer("clips") as writer:
            for row in self._claim(todo):
                if self.state.is_main_process:
                    bar.update(len(os.listdir(self._claims)) - bar.n)  # of all ranks
                content = self.clips[row]
                try:
                    tensors = encoder.encode(load_clip(content), modes=content.get("modes") or [])
                except (ValueError, torch.OutOfMemoryError) as error:
                    self._reject(content["clip_id"], str(error))
                    continue
                except BaseException:
                    writer.flush()  # what is encoded is kept, whatever stops this rank
                    raise
                writer.write({**self._describe(content), **tensors})
        bar.close()

    def _clip_encoder(self) -> ClipEncoder:
        return ClipEncoder(self.variant, self.checkpoint, known_variants=self.known_variants, device=self.state.device)

    def _claim(self, rows: list[int]) -> Iterator[int]:
        """Yield the rows that this rank gets; a claim file made by `O_EXCL` belongs to one rank.

        Ranks begin far apart and take what slower ones have left, so that they seldom try the same row.
        """
        start = len(rows) * self.state.process_index // self.state.num_processes
        taken: set[str] = set()
        for row in rows[start:] + rows[:start]:
            if str(row) in taken:
                continue
            try:
                os.close(os.open(self._claims / str(row), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                taken = set(os.listdir(self._claims))
                continue
            yield row

    def _describe(self, clip: dict[str, Any]) -> dict[str, Any]:
        caption = clip["caption"] or ""
        return {
            "schema": LATENTS_SCHEMA, "source_sha256": clip["source"]["sha256"], "caption": caption,
            "caption_id": caption_id(caption), "modes": clip.get("modes") or [], "keys": self.keys,
            **{name: clip[name] for name in ("clip_id", "num_frames", "height", "width", "fps")},
        }  # fmt: skip

    def _reject(self, clip_id: str, reason: str) -> None:
        logger.warning("clip %s is left out: %s", clip_id, reason)
        with self._rejected.open("a") as file:
            file.write(json.dumps({"clip_id": clip_id, "reason": reason}) + "\n")

    def _encode_nulls(self) -> None:
        """Empty and negative prompt, all -1 face, and the constant known latents of each shape."""
        done: set[tuple[str, str]] = set()
        if store.parts(self.root / "null"):
            rows = store.load(self.root / "null", LATENTS_SCHEMA, columns=["kind", "shape"])
            done = {(row["kind"], row["shape"]) for row in rows}
        with self._writer("null") as writer:
            for (kind, shape), tensor in self._nulls(done):
                writer.write({"schema": LATENTS_SCHEMA, "kind": kind, "shape": shape, "tensor": tensor_to_cell(tensor)})

    def _nulls(self, done: set[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], Tensor]]:
        if prompts := {kind: prompt for kind, prompt in NULL_PROMPTS.items() if (kind, "") not in done}:
            texts = store.load(self.root / "text", LATENTS_SCHEMA)
            rows = {name: row for row, name in enumerate(texts.select_columns(["caption_id"])["caption_id"])}
            for kind, prompt in prompts.items():
                yield (kind, ""), cell_to_tensor(texts[rows[caption_id(prompt)]]["embeddings"])
        if not self.variant.has_animate_adapter:
            return
        shapes = sorted(set(self._shapes(list(range(len(self.clips))))))
        wanted = [shape for shape in shapes if ("animation_known", bucket_key(*shape)) not in done]
        if wanted or ("face", "") not in done:
            encoder = self._clip_encoder()
            if ("face", "") not in done:
                yield ("face", ""), encoder.no_face()
            for shape in wanted:
                yield ("animation_known", bucket_key(*shape)), encoder.nothing_known(*shape)

    def _summarise(self) -> None:
        done = len(store.ids(self.root / "clips", "clip_id"))
        if done == 0:
            raise ValueError(f"{self.root}: no clip could be encoded; the reasons are in {self._rejected}")
        if self.state.is_main_process:
            left_out = f"; {self._rejected} says why the others were not" if done < len(self.clips) else ""
            logger.info("%s: %d of %d clips encoded%s", self.root, done, len(self.clips), left_out)


def _clips_settings(path: Path) -> str:
    """The settings hash of the run that made the clips, so that clips made anew are not taken for the old ones."""
    file = path / store.RUN_FILE
    return str(json.loads(file.read_text())["settings_hash"]) if file.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
