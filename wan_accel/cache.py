"""Encode a clips dataset once: `accelerate launch [--config_file CONFIG] -m wan_accel.cache RECIPE [key=value ...]`.

Captions first, each distinct one once; then clips, which ranks claim one by one without talking to each other. Run
again, it encodes what is new and what is stale: other weights, other settings, a clip that was made anew.
"""

import logging
import shutil
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from wan_accel.cache_clips import ClipsJob
from wan_accel.cache_lock import lone_run
from wan_accel.cache_nulls import encode_nulls
from wan_accel.cache_plan import GIB, ClipWork, Estimate, estimate, plan_clips, plan_texts
from wan_accel.cache_source import ClipsSource
from wan_accel.cache_texts import drop_stale_texts, encode_texts, refuse_lone_sharding
from wan_accel.data import store
from wan_accel.data.provenance import warn_of_removed
from wan_accel.data.revisions import remove_unfinished, take_over
from wan_accel.data.schema import LATENTS_SCHEMA, latents_features, null_features, text_features
from wan_accel.disk import free_bytes
from wan_accel.models.checkpoint_files import check_encoder_files, condition_keys
from wan_accel.models.conditioning.clips import ClipEncoder
from wan_accel.models.hub import resolve_checkpoint
from wan_accel.models.variants import get_variant
from wan_accel.parallel.agreement import check_same_rows, from_main_rank
from wan_accel.recipe.check import check
from wan_accel.recipe.commandline import log_on_main_rank, parse_overrides, recipe_parser
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe

logger = logging.getLogger("wan_accel")
_FEATURES = {"clips": latents_features, "text": text_features, "null": null_features}


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
        if recipe.data.latents is None:
            problems.append("data.latents is missing: the folder to encode into")
        if problems:
            raise ValueError("\n".join(problems))
        assert recipe.data.clips is not None and recipe.data.latents is not None
        # Without a GPU accelerate only starts processes' group if told so. Ranks finish far apart: wait a day.
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        self.shard_text_encoder = recipe.cache.shard_text_encoder
        if self.shard_text_encoder:
            refuse_lone_sharding(self.state)
        self.variant = get_variant(recipe.variant)
        self.checkpoint = resolve_checkpoint(recipe.model.checkpoint, recipe.model.revision)
        self.root = Path(recipe.data.latents)
        self.known_variants = recipe.cache.known_variants
        clips = Path(recipe.data.clips)
        # It may be growing: the main rank's list of its parts counts.
        listing = from_main_rank(lambda: store.listed(clips))
        self.source = ClipsSource(
            clips, self.variant, captions=recipe.data.captions, where=recipe.data.where, listing=listing
        )
        check_same_rows(self.source.digest, f"data.clips={clips}")
        check_encoder_files(self.checkpoint, self.variant)
        self.keys = condition_keys(self.variant, self.checkpoint, known_variants=self.known_variants)
        self.clip_keys = {kind: key for kind, key in self.keys.items() if kind != "text"}

    def plan(self) -> tuple[ClipWork, list[str]]:
        """Clips and captions that are to be encoded."""
        work = plan_clips(self.source, self.root / "clips", self.clip_keys)
        return work, plan_texts(self.source, self.root / "text", self.keys["text"])

    def estimate(self) -> Estimate:
        """What `run` will write and cost."""
        work, captions = self.plan()
        return estimate(
            self.variant,
            self.source,
            work,
            captions,
            every_kind=self.clip_keys.keys(),
            known_variants=self.known_variants,
        )

    def describe(self) -> str:
        """Bytes that are still to be written, by column, and what encoding them costs."""
        return "\n".join(self.estimate().lines(free_bytes(self.root)))

    def check_disk(self) -> None:
        """Compare the bytes that are still to be written with the free space. Collective.

        Raises:
            ValueError: the disk is too small.
        """
        from_main_rank(self._check_disk)

    def _check_disk(self) -> None:
        total = self.estimate().peak(self.state.num_processes)
        if total > (free := free_bytes(self.root)):
            raise ValueError(
                f"data.latents={self.root} needs {total / GIB:.2f} GiB but {free / GIB:.2f} GiB are free: free "
                "some, or use another disk"
            )

    def run(self) -> None:
        """Encode what is not there yet or stale. Collective.

        Raises:
            ValueError: the output folder is another run's, the disk is full, or no clip could be encoded.
        """
        self._claim_output()
        with ExitStack() as stack:
            from_main_rank(lambda: stack.enter_context(lone_run(self.root)))
            self._run()

    def _run(self) -> None:
        self._clear_the_way()
        parts, new, captions = from_main_rank(self._shared_plan)
        encode_texts(
            captions,
            self.root / "text",
            checkpoint=self.checkpoint,
            key=self.keys["text"],
            state=self.state,
            shard=self.shard_text_encoder,
        )
        job = self._clips_job()
        job.run(parts, new)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._finish(job)
        self.state.wait_for_everyone()
        self._summarise(job)

    def _shared_plan(self) -> tuple[tuple[Path, ...], tuple[str, ...], list[str]]:
        """Parts to write again, ids of new clips, captions: one list for all ranks, whatever they see of the folder."""
        work, captions = self.plan()
        return work.parts, work.new, captions

    def _clips_job(self) -> ClipsJob:
        encoder = ClipEncoder(
            self.variant, self.checkpoint, known_variants=self.known_variants, device=self.state.device
        )
        return ClipsJob(self.root, self.source, encoder, keys=self.clip_keys, state=self.state)

    def _claim_output(self) -> None:
        """Check on every rank, so that every rank stops with the reason."""
        if (self.root / store.RUN_FILE).is_file():
            raise ValueError(f"data.latents={self.root} is itself a dataset of wan-accel: give another folder")
        for part, features in _FEATURES.items():
            settings = {"variant": self.variant.name, "columns": store.settings_hash(features().to_dict())}
            store.claim_output(self.root / part, schema=LATENTS_SCHEMA, settings=settings)
        self.state.wait_for_everyone()

    def _clear_the_way(self) -> None:
        """Remove what runs that were killed left behind; the folder is this run's alone."""
        if self.state.is_main_process:
            claims = self.root / "clips" / "claims"
            shutil.rmtree(claims, ignore_errors=True)  # of a run that was killed
            claims.mkdir()
            (self.root / "rejected.jsonl").unlink(missing_ok=True)  # they are tried again
            for part, features in _FEATURES.items():
                remove_unfinished(self.root / part)
                take_over(self.root / part, features())
        self.state.wait_for_everyone()

    def _finish(self, job: ClipsJob) -> None:
        shutil.rmtree(job.claims, ignore_errors=True)
        for part, features in _FEATURES.items():
            store.refresh_state(self.root / part, features())
        drop_stale_texts(self.root / "text", self.keys["text"])
        shapes = set(self.source.shapes(self.source.chosen))
        encode_nulls(self.root, job.encoder, keys=self.keys, shapes=shapes)

    def _summarise(self, job: ClipsJob) -> None:
        done = store.ids(self.root / "clips", "clip_id")
        encoded = sum(self.source.clip_ids[row] in done for row in self.source.chosen)
        if encoded == 0:
            raise ValueError(f"{self.root}: no clip could be encoded; the reasons are in {job.rejected}")
        if self.state.is_main_process:
            warn_of_removed(sorted(filter(self.source.is_missing, done)), self.root, self.source.rows.root)
            has_failed = encoded < len(self.source) or job.rejected.is_file()
            left_out = f"; {job.rejected} says which could not be, and why" if has_failed else ""
            logger.info("%s: %d of %d clips encoded%s", self.root, encoded, len(self.source), left_out)


if __name__ == "__main__":
    sys.exit(main())
